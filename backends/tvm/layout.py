"""What a lowered model's folder holds. Without PyTorch and without TVM, so that who only runs a model loads neither."""

from __future__ import annotations

LIBRARY, PARAMETERS = "model.so", "parameters.bin"
NATIVE = "dyncomp_tvm.so"
"""The native operators, beside a model that calls them."""
SCHEMA = 1
ALIGNMENT = 64
"""Bytes of which every array that TVM is given begins at a multiple: others crash it."""
