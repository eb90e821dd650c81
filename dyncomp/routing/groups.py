"""Group-limited top-k: experts stand in groups (on one device each), and a token may use few groups only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dyncomp.ops import topk_gates
from dyncomp.routing.top_k import one


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


def deepseek_v3(scores: Tensor, bias: Tensor, k: int, groups: int, kept: int, *, shared: int = 0, factor: float = 1.0) -> Tensor:
    """Gates of DeepSeek-V3 (2412.19437, equations 12 to 16): [..., E], [E] -> [..., E].

    Sigmoid affinities; ``bias`` is added where experts and groups are chosen, and is not part of the weights: it gets no gradient, see
    :func:`dyncomp.routing.balance.bias_step`.

    Args:
        shared: how many experts, the first ones, run for every token with a gate of 1; they are not scored.
        k: of the others. groups, kept: of the others, see :func:`limit_to_groups`.
        factor: what the weights of a token's k experts sum to (``routed_scaling_factor``).
    """
    affinity, chosen = _chosen(scores, bias, k, groups, kept, shared)
    return _open(scores, affinity * factor, chosen, shared)


def deepseek_v3_parts(scores: Tensor, bias: Tensor, k: int, groups: int, kept: int, *, shared: int = 0) -> Tensor:
    """1 for the experts that DeepSeek-V3 chooses, with the gradient of k times their normalised weights: [..., E], [E] -> [..., E].

    For experts carved out of a dense FFN: with all of them it is the dense one, whatever they score.
    """
    affinity, chosen = _chosen(scores, bias, k, groups, kept, shared)
    return _open(scores, one(affinity * k), chosen, shared)


def _chosen(scores: Tensor, bias: Tensor, k: int, groups: int, kept: int, shared: int) -> tuple[Tensor, Tensor]:
    """(normalised affinities [..., k], experts [..., k]) of each token; experts are counted without the shared ones."""
    affinity = scores.sigmoid()
    # The bias has all experts, as the scores have, so that training finds it: see dyncomp.regions.router.selection_bias.
    biased = affinity + bias
    if shared:
        affinity, biased = affinity[..., shared:], biased[..., shared:]
    chosen = limit_to_groups(biased, groups, kept).topk(k, -1).indices
    weights = affinity.gather(-1, chosen)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


def _open(scores: Tensor, weights: Tensor, chosen: Tensor, shared: int) -> Tensor:
    """Gates [..., E]: 1 for the shared experts, ``weights`` [..., k] for those ``chosen``, 0 for the others."""
    if not shared:
        return torch.zeros_like(scores).scatter(-1, chosen, weights)
    first, others = scores[..., :shared], scores[..., shared:]
    return torch.cat([torch.ones_like(first), torch.zeros_like(others).scatter(-1, chosen, weights)], -1)
