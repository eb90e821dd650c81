"""Expert choice: experts take tokens, instead of tokens experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncomp.routing.top_k import one


def expert_choice(scores: Tensor, share: float) -> Tensor:
    """1 for the tokens that score highest with an expert, a ``share`` of each sequence: [..., S, E] -> [..., S, E].

    Zhou et al. (2202.09368): every expert has the same load, and tokens as many experts as want them. Whether a token is among the best
    depends on the tokens after it, so this cannot decode. Padding takes part. The gradient of an open gate is its score's.
    """
    order = scores.sort(-2, descending=True).indices
    every = torch.ones_like(scores)
    room = (every.sum(-2, keepdim=True) * share).round().clamp_min(1.0)
    taken = (every.cumsum(-2) <= room).to(scores.dtype)
    return torch.zeros_like(scores).scatter(-2, order, taken) * one(scores)
