"""The kernels, in TVMScript: one idea a file, each with its roofline."""

import dyncomp.backends.tvm.script  # noqa: F401  (makes them in half the time)
