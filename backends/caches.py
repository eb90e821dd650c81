"""The memory of KV caches."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from dyncomp.backends.recompute import Array


def cache_names(model: Any) -> list[str]:
    """The inputs of a lowered model that are KV caches."""
    return [n for n in model.inputs if "_cache_" in n]


def allocate_caches(model: Any, batch: int, capacity: int, zeros: Callable[..., Array] = np.zeros) -> list[Array]:
    """[batch, Hkv, capacity, D] of zeros for each of :func:`cache_names`, of its type.

    Of a model from whose attentions tokens are absent they take memory page by page, as they are written: our kernel puts the entries of
    the tokens that are present side by side.
    """
    sizes, names = {"batch": batch, "capacity": capacity}, cache_names(model)
    if any(n.startswith("present_cache_") for n in names):
        zeros = page_by_page
    specs = [i for i in model.config["inputs"] if i["name"] in names]
    return [zeros([sizes.get(d, d) for d in s["shape"]], np.dtype(s["dtype"])) for s in specs]


def page_by_page(shape: Sequence[int], dtype: Any) -> Array:
    """Zeros that take no memory before they are written, not even where the system has large pages."""
    count = int(np.prod(shape, dtype=np.int64))
    memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, count).reshape(shape)
