"""Tensors in files that are mapped into memory, for models that memory does not hold.

A mapped tensor is an ordinary one: PyTorch reads it like any other, and gives the same results. Its pages come from the file when they are
read, and the system takes them back when it needs the room; :func:`release` gives them back at once, so that what a process has in memory
is what it works on.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import struct
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from dyncomp.errors import RequestError

SMALLEST = 1 << 16
"""Bytes from which on a tensor goes into a file."""
RESIDENT = 1 << 30
"""Bytes of mapped files (the program's own among them) that stay in memory between two calls of :func:`trim`."""
_PART = 1 << 24  # elements that are converted and written at once
_FAILED = ctypes.c_void_p(-1).value

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_mapped: dict[int, int] = {}  # address -> bytes, of every mapping that some tensor still reads


class TensorStore:
    """Puts tensors into nameless files of one folder: what they take on disk is free again when the last tensor that reads one is gone.

    Raises:
        RequestError: this system has no ``mmap``.
    """

    def __init__(self, folder: Path) -> None:
        if os.name != "posix":
            raise RequestError("--low-memory needs a system that maps files into memory as POSIX says", hint="leave it out")
        self.folder = folder

    def put(self, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor, or, if it is large, an equal one (same strides) in a file.

        Args:
            dtype: to convert it to, part by part; None keeps its own.
        """
        dtype = dtype or value.dtype
        if value.device.type != "cpu" or value.numel() * dtype.itemsize < SMALLEST:
            return value.to(dtype)
        if is_mapped(value) and value.dtype == dtype:
            return value
        order = sorted(range(value.ndim), key=lambda axis: -value.stride()[axis])
        dense = value.detach().permute(order).contiguous()
        with tempfile.TemporaryFile(dir=self.folder) as file:
            _write(file, dense, dtype)
            file.flush()
            stored = torch.frombuffer(_map(file, dense.numel() * dtype.itemsize), dtype=dtype)
        return stored.view(dense.shape).permute([order.index(axis) for axis in range(value.ndim)])

    def adopt(self, module: nn.Module) -> None:
        """Put the parameters and buffers of ``module`` that are large into files; tied ones stay tied."""
        known: dict[tuple[Any, ...], Tensor] = {}
        for owner in module.modules():
            tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
            for table in tables:
                for name, value in table.items():
                    if value is None:
                        continue
                    key = (value.data_ptr(), tuple(value.shape), value.stride())
                    if key not in known:
                        stored = self.put(value)
                        known[key] = nn.Parameter(stored, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else stored
                    table[name] = known[key]


def is_mapped(value: Tensor) -> bool:
    """Whether the tensor reads a file that this module has mapped."""
    return value.device.type == "cpu" and value.untyped_storage().data_ptr() in _mapped


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file (checked by :func:`dyncomp.models.checkpoint.check_safetensors`), mapped. Not to be written to:
    what is written may be lost."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        size = path.stat().st_size
        whole = torch.frombuffer(_map(file, size, private=True), dtype=torch.uint8)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            dtype = _DTYPES[entry["dtype"]]
            data = whole[start:end]
            found[name] = (data.view(dtype) if start % dtype.itemsize == 0 else data.clone().view(dtype)).view(entry["shape"])
    return found


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file one tensor after the other; ``safetensors.torch.save_file`` has all of them in memory at the end."""
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # as safetensors does it: everything is aligned
    header, end = dict[str, Any](), 0
    for name in order:
        value = tensors[name]
        start, end = end, end + value.numel() * value.dtype.itemsize
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write(file, tensors[name].detach().contiguous(), tensors[name].dtype)


def release() -> None:
    """Give the pages of all mapped tensors back. What they hold is in the files; reading it again brings it back."""
    for address, size in list(_mapped.items()):
        _libc().madvise(address, size, mmap.MADV_DONTNEED)


def trim() -> None:
    """:func:`release` when more than :data:`RESIDENT` of mapped files is in memory. Cheap: may be called after every operation."""
    if _mapped and _resident_files() > RESIDENT:
        release()


def _resident_files() -> int:
    """Bytes of mapped files in memory; 0 where the system does not say (it takes pages back by itself in any case)."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def _write(file: BinaryIO | Any, dense: Tensor, dtype: torch.dtype) -> None:
    """The values of a contiguous tensor; written, not copied into a mapping, so that a full disk is an error and not a signal."""
    for part in dense.reshape(-1).split(_PART):
        file.write(memoryview(part.to(dtype).view(torch.uint8).numpy()))
        trim()


def _map(file: BinaryIO | Any, size: int, *, private: bool = False) -> ctypes.Array[ctypes.c_char]:
    """The file as a buffer. Not Python's own ``mmap``, which would keep a file descriptor open for each of a thousand tensors."""
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    address = _libc().mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file.fileno(), 0)
    if address == _FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "mmap")
    buffer = (ctypes.c_char * size).from_address(address)
    _mapped[address] = size
    weakref.finalize(buffer, _unmap, address, size).atexit = False  # tensors may outlive it; the process is about to end
    return buffer


def _unmap(address: int, size: int) -> None:
    del _mapped[address]
    _libc().munmap(address, size)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mmap.restype, libc.mmap.argtypes = pointer, [pointer, size, number, number, number, ctypes.c_long]
    libc.madvise.argtypes, libc.munmap.argtypes = [pointer, size, number], [pointer, size]
    return libc
