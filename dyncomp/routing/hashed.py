"""Routing by token id: no router to compute or to train, and none that can collapse."""

from __future__ import annotations

import torch
from torch import Tensor


def hash_table(vocabulary: int, experts: int, k: int, *, seed: int = 0) -> Tensor:
    """Gates of every token id: [V, E], ``k`` of them 1 / k in each row; every expert serves as many ids as any other, or one fewer or more.

    Hash Layers (Roller et al., 2106.04426, section 3): a fixed random assignment, here dealt out evenly. Ids in a text are not even:
    frequent ones load their experts.
    """
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(vocabulary, generator=generator) % experts
    order = torch.randperm(experts, generator=generator)
    table = torch.zeros(vocabulary, experts)
    for step in range(k):
        table[torch.arange(vocabulary), order[(first + step) % experts]] = 1 / k
    return table
