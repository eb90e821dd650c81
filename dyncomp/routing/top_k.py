"""Token choice: every token runs its k best experts."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Softmax over the ``k`` best scores of each token, 0 elsewhere: [..., E] -> [..., E], rows sum to 1.

    Mixtral (2401.04088, section 2.1): the softmax of all scores, renormalised. At ``k`` = 1 the weight is always 1, so that experts that
    are copies of one FFN give what it gives; its gradient is then that of the logarithm of the probability, as in Switch (2101.03961)
    up to the scale.
    """
    values, chosen = scores.topk(k, -1)
    weights = values.softmax(-1) if k > 1 else one(values - scores.logsumexp(-1, keepdim=True))
    return torch.zeros_like(scores).scatter(-1, chosen, weights)


def tempered_top_k(scores: Tensor, k: int, temper: int) -> Tensor:
    """``k`` times the softmax of ``2^-temper`` times the ``k`` best scores of each token: [..., E] -> [..., E], rows sum to ``k``.

    For experts carved out of a dense FFN, which want gates of 1, where stock servers shall compute them: their mixtures have a softmax of
    scores, and this one is nearly flat. The larger ``temper`` is, the nearer are gates to 1, and the larger is the difference of scores
    that a program needs which chooses experts by their probabilities in float32: about ``2^(temper - 23)``.
    """
    return k * top_k(scores * 2.0**-temper, k)


def one(value: Tensor) -> Tensor:
    """1, with the gradient of ``value``."""
    return 1 + (value - value.detach())
