"""The header of a GGUF file, read in one go and checked against the file's length.

The ``gguf`` package's reader makes a numpy array of every string of the vocabulary (seconds for a small model), and reports
a truncated file as a reshape error. This one takes a tenth of a second, and says what is missing.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from dyncomp.errors import ModelError

STRING, ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_AGAIN = "download or copy the file again"
_CONVERT = "convert the model again with a current llama.cpp"


@dataclass(frozen=True)
class Value:
    """One metadata entry. Strings are bytes; an array is a list."""

    types: tuple[int, ...]  # GGUF type ids: (scalar or string,), or (ARRAY, type of the elements)
    value: Any


@dataclass(frozen=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]  # elements, slowest dimension first, as in torch
    type_id: int  # ggml type
    offset: int  # bytes from the start of the file
    size: int  # bytes


@dataclass(frozen=True)
class GgufFile:
    path: Path
    metadata: dict[str, Value]
    tensors: tuple[TensorEntry, ...]

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"].value.decode()


def read_gguf(path: Path, block_sizes: dict[int, tuple[int, int]]) -> GgufFile:
    """Read the header of ``path``.

    Args:
        block_sizes: ggml type id -> (elements a block, bytes a block); ``gguf.GGML_QUANT_SIZES``.

    Raises:
        ModelError: the file is no GGUF file, is of an unknown version or tensor type, or is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it starts with {magic!r}, not with b'GGUF'", hint=_AGAIN)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(path, data, size, block_sizes)
            except (struct.error, EOFError, UnicodeDecodeError, MemoryError, OverflowError) as error:
                raise ModelError(
                    f"{path} is truncated or damaged: its header runs past the file's end at {size} bytes", hint=_AGAIN
                ) from error


def _parse(path: Path, data: mmap.mmap, size: int, block_sizes: dict[int, tuple[int, int]]) -> GgufFile:
    (version,) = struct.unpack_from("<I", data, 4)
    if version not in (2, 3):
        swapped = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise ModelError(f"{path} is GGUF version {version}{swapped}; versions 2 and 3 are supported", hint=_CONVERT)
    tensor_count, value_count = struct.unpack_from("<QQ", data, 8)
    at = 24
    metadata: dict[str, Value] = {}
    for _ in range(value_count):
        key, at = _string(data, at, size)
        (kind,) = struct.unpack_from("<I", data, at)
        metadata[key.decode()], at = _value(data, at + 4, size, kind)
    if "general.architecture" not in metadata or metadata["general.architecture"].types != (STRING,):
        raise ModelError(f"{path} names no general.architecture, so nothing says how to build the model", hint=_CONVERT)
    entries = []
    for _ in range(tensor_count):
        name, at = _string(data, at, size)
        (dims,) = struct.unpack_from("<I", data, at)
        shape = struct.unpack_from(f"<{dims}Q", data, at + 4)[::-1]
        type_id, offset = struct.unpack_from("<IQ", data, at + 4 + 8 * dims)
        at += 16 + 8 * dims
        entries.append((name.decode(), shape, type_id, offset))
    alignment = metadata["general.alignment"].value if "general.alignment" in metadata else 32
    start = -(-at // alignment) * alignment
    tensors = []
    for name_, shape, type_id, offset in entries:
        if type_id not in block_sizes:
            raise ModelError(f"{path}: the tensor {name_!r} has the unknown ggml type {type_id}", hint="upgrade the gguf package")
        elements, block_bytes = block_sizes[type_id]
        tensors.append(TensorEntry(name_, shape, type_id, start + offset, prod(shape) // elements * block_bytes))
    end = max((tensor.offset + tensor.size for tensor in tensors), default=start)
    if end > size:
        short = sum(tensor.offset + tensor.size > size for tensor in tensors)
        raise ModelError(
            f"{path} is truncated: its header says {end} bytes, the file has {size} ({short} of {len(tensors)} tensors incomplete)",
            hint=_AGAIN,
        )
    return GgufFile(path, metadata, tuple(tensors))


def _string(data: mmap.mmap, at: int, size: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    end = at + 8 + length
    if end > size:
        raise EOFError
    return data[at + 8 : end], end


def _value(data: mmap.mmap, at: int, size: int, kind: int) -> tuple[Value, int]:
    if kind == STRING:
        text, at = _string(data, at, size)
        return Value((STRING,), text), at
    if kind in _SCALARS:
        form = "<" + _SCALARS[kind]
        return Value((kind,), struct.unpack_from(form, data, at)[0]), at + struct.calcsize(form)
    if kind != ARRAY:
        raise EOFError  # no such type: what is read here is not metadata any more
    element, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if element in _SCALARS:
        form = f"<{count}{_SCALARS[element]}"
        return Value((ARRAY, element), list(struct.unpack_from(form, data, at))), at + struct.calcsize(form)
    if count > size:
        raise EOFError
    values = []
    for _ in range(count):
        if element == STRING:
            value, at = _string(data, at, size)
        else:
            nested, at = _value(data, at, size, element)
            value = nested.value
        values.append(value)
    return Value((ARRAY, element), values), at
