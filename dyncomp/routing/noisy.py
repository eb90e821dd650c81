"""Noise on scores while training, so that experts that lose narrowly are tried."""

from __future__ import annotations

import torch
from torch import Tensor


def noisy(scores: Tensor, deviation: float) -> Tensor:
    """``scores`` plus normal noise, ``deviation`` times their standard deviation over experts: [..., E] -> [..., E], E > 1.

    Noisy top-k gating (Shazeer et al., 1701.06538, equation 4) with a fixed deviation in place of a learned one, as in V-MoE
    (2106.05974). From the global generator, which gradient checkpoints restore.
    """
    return scores + deviation * scores.detach().std(-1, keepdim=True) * torch.randn_like(scores)
