"""Group-limited top-k: experts stand in groups (on one device each), and a token may use few groups only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyncomp.ops import topk_gates


def limit_to_groups(scores: Tensor, groups: int, kept: int) -> Tensor:
    """Minus infinity outside the ``kept`` best groups of each token: [..., E] -> [..., E].

    A group of E / ``groups`` neighbours is as good as its two best experts together (DeepSeek-V3, 2412.19437, section 2.1.2).
    """
    size = scores.shape[-1] // groups
    members = torch.stack(scores.split(size, -1), -2)  # [..., G, E / G]
    return within_best(members, members.topk(min(2, size), -1).values.sum(-1), kept)


def within_best(members: Tensor, worth: Tensor, kept: int) -> Tensor:
    """Minus infinity outside the ``kept`` groups of most worth: [..., G, E / G], [..., G] -> [..., E]."""
    opened = torch.zeros_like(worth).scatter(-1, worth.topk(kept, -1).indices, 1.0)
    return torch.cat(members.masked_fill((opened == 0).unsqueeze(-1), -math.inf).unbind(-2), -1)


def group_top_k(scores: Tensor, k: int, groups: int, kept: int) -> Tensor:
    """1 for the ``k`` best experts in the ``kept`` best groups of each token: [..., E] -> [..., E]; straight-through gradient.

    For experts carved out of a dense FFN, whose gates are 1 when they run.
    """
    return topk_gates(limit_to_groups(scores, groups, kept), k)


def deepseek_v3(scores: Tensor, bias: Tensor, k: int, groups: int, kept: int) -> Tensor:
    """Gates of DeepSeek-V3 (2412.19437, equations 12 to 16): [..., E], [E] -> [..., E], rows sum to 1.

    Sigmoid affinities; ``bias`` is added where experts and groups are chosen, and is not part of the weights: it gets no gradient, see
    :func:`dyncomp.routing.balance.bias_step`.
    """
    affinity = scores.sigmoid()
    chosen = limit_to_groups(affinity + bias, groups, kept).topk(k, -1).indices
    weights = affinity.gather(-1, chosen)
    return torch.zeros_like(scores).scatter(-1, chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20))
