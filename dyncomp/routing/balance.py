"""Even use of experts: two losses, a bias that needs none, and a figure that shows collapse."""

from __future__ import annotations

import torch
from torch import Tensor


def balance_loss(scores: Tensor, gates: Tensor) -> Tensor:
    """Load balance of one router (Switch, 2101.03961, section 2.2): E * sum_e load_e * probability_e, 1 when even; both [..., E]."""
    load = (gates.detach() != 0).float().flatten(0, -2).mean(0)
    chance = torch.sigmoid(scores.float()).flatten(0, -2).mean(0)
    return load.numel() * ((load / load.sum().clamp_min(1e-6)) * (chance / chance.sum())).sum()


def z_loss(scores: Tensor) -> Tensor:
    """Mean squared log-partition of one router (ST-MoE, 2202.08906): keeps scores small; [..., E]."""
    return torch.logsumexp(scores.float(), -1).square().mean()


def bias_step(load: Tensor, rate: float) -> Tensor:
    """What is added to experts' biases after a step in which they had this ``load``: [E] -> [E] (2408.15664; DeepSeek-V3, 2412.19437).

    ``rate`` up for those used less than average, down for the others.
    """
    return rate * torch.sign(load.mean() - load)


def spread(load: Tensor) -> float:
    """How much the choice of experts depends on the token: 1 when all are used alike, 0 when every token runs the same (collapse).

    Args:
        load: [E] fraction of the tokens that each expert ran for, shared experts left out.

    The number of experts that are in use, exp(entropy of the load), between as many as a token runs, and all. 1 when every expert always
    runs; 0 when none ever does.
    """
    load = load.double()
    least, experts = float(load.sum()), load.numel()
    if least == 0 or least >= experts - 1e-6:
        return float(least > 0)
    shares = load / least
    used = float(torch.special.entr(shares).sum().exp())
    return min(max((used - max(least, 1.0)) / (experts - max(least, 1.0)), 0.0), 1.0) if experts > 1 else 1.0
