"""Several processes that train one model: each computes a part of every batch, gradients are summed.

``torchrun`` starts them: ``dyncomp heal``, in which the first leads (:mod:`dyncomp.heal.together`), or a program of one's own, which
trains inside :func:`joined`.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process among all that train."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that ``torchrun`` started (over gloo), for a while; nothing when there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # while the first calibrates and evaluates, the others wait
    try:
        yield
    finally:
        dist.destroy_process_group()


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in as few messages as there are megabytes."""
    if world() == 1:
        return
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        waiting.append(tensor)
        size += tensor.numel()
        if size > 1 << 22:
            _add_up(waiting)
            waiting, size = [], 0
    if waiting:
        _add_up(waiting)


def _add_up(tensors: list[Tensor]) -> None:
    flat = torch.cat([t.flatten().float() for t in tensors])
    dist.all_reduce(flat)
    for tensor, value in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(value.view_as(tensor))


def agreed(value: int) -> int:
    """The first process's value."""
    if world() == 1:
        return value
    tensor = torch.tensor([value], dtype=torch.int64)
    dist.broadcast(tensor, 0)
    return int(tensor)
