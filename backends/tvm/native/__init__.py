"""The operators of :mod:`dyncomp.backends.native` as packed functions of TVM, ``dyncomp_<operator>(attributes, inputs..., output)``."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

from dyncomp.backends.native import build
from dyncomp.backends.tvm.require import require_runtime

PREFIX = "dyncomp_"
"""What the functions' names begin with."""


def library(folder: Path | None = None, *, architecture: str | None = None) -> Path:
    """The library with the functions; see :func:`dyncomp.backends.native.build.library`."""
    require_runtime()
    import tvm_ffi

    found = importlib.util.find_spec("tvm")
    assert found is not None
    assert found.origin is not None
    includes = [*tvm_ffi.libinfo.include_paths(), str(Path(found.origin).parent / "include")]
    return build.library(Path(__file__).parent, folder, includes=includes, architecture=architecture)


def instruction_set(path: Path) -> str:
    """The kernels that a library uses on this processor: ``portable``, ``avx2`` or ``avx512``; empty when DYNCOMP_NATIVE_ISA asks for
    what there is not.

    Raises:
        OSError: it cannot be loaded.
    """
    name = ctypes.CDLL(str(path)).dyncomp_native_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())
