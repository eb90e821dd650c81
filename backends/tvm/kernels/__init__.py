"""The kernels, in TVMScript: one idea a file, each with its roofline."""
