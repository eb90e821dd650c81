"""Code for GPUs: our kernels' schedules, DLight's for the rest, and what CUDA's compiler says about both."""
