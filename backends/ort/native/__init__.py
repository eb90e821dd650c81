"""The operators of :mod:`dyncomp.backends.native` as custom operators of ONNX Runtime, domain ``dyncomp``."""

from __future__ import annotations

from pathlib import Path

from dyncomp.backends.native import build

DOMAIN = "dyncomp"


def library(folder: Path | None = None) -> Path:
    """The library for ``SessionOptions.register_custom_ops_library``; see :func:`dyncomp.backends.native.build.library`."""
    return build.library(Path(__file__).parent, folder)
