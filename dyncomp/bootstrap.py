"""Bootstrap confidence intervals (Efron, 1979): how far a figure would move on other text of the same kind."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 1000


def interval(values: Tensor, *, exponential: bool = False, seed: int = 0) -> list[float] | None:
    """[low, high] of the mean over items (windows, questions) at :data:`LEVEL`, by percentiles over resampled items.

    Paired comparisons give the *difference* of each item: what both models find hard on an item then cancels.

    Args:
        values: [items], of one model or differences of two.
        exponential: the figure is exp(mean) - 1, as the rise of a perplexity is of differences in log-likelihood.
        seed: equal seeds draw equal items, so that intervals of several models are of the same resamples.

    Returns:
        None for fewer than two items: one item says nothing about others.
    """
    if len(values) < 2:
        return None
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values.double()[drawn].mean(1)
    edges = torch.quantile(means, torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return [math.expm1(v) if exponential else v for v in edges]
