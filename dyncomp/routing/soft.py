"""Soft MoE: experts compute mixtures of tokens, and tokens get mixtures of what they give."""

from __future__ import annotations

from torch import Tensor


def soft(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(dispatch, combine) of Soft MoE (Puigcerver et al., 2308.00951, section 2.1): [..., S, P] -> twice [..., S, P], P slots.

    Slot p computes ``sum_s dispatch[s, p] x[s]``, columns summing to 1; token s gets ``sum_p combine[s, p] y[p]``, rows summing to 1.
    No token is dropped and no expert idle, whatever the logits. Every token sees every other, so it cannot decode. Padding takes part.
    """
    return logits.softmax(-2), logits.softmax(-1)
