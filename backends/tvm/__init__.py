"""TVM: Relax programs over kernels of our own, in TVMScript."""
