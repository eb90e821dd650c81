"""Routing twice: a router chooses experts, a second one which parts of them run."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncomp.ops import threshold_gates


def parts_of(gates: Tensor, scores: Tensor) -> Tensor:
    """The gates of experts, for those of their parts whose score is positive: [..., E], [..., m E] -> [..., m E].

    Part p of expert e is at p E + e. With every score positive an expert's parts all have its gate. Straight-through gradient of scores.
    """
    return torch.cat([gates] * (scores.shape[-1] // gates.shape[-1]), -1) * threshold_gates(scores)
