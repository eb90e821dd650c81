"""Linear probe: how well a linear map of a model's embeddings tells classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

FOLDS = 5
RIDGES = tuple(10.0**power for power in range(-4, 3))
"""Times the mean variance of an embedding's features: what may be added to each."""


def probe(fitted: Tensor, tested: Tensor, labels: Tensor, *, seed: int = 0) -> Tensor:
    """Which items a linear classifier gets right, each by one that was fitted to the other folds.

    Least squares to one-hot targets with a ridge, in closed form (Hastie et al., The Elements of Statistical Learning, section 4.2).

    Args:
        fitted: [n, d] embeddings that the classifiers are fitted to. tested: [n, d] those they are tried on: the same, or another model's
            of the same items.
        labels: [n] classes.
        seed: which items are in which fold.

    Returns:
        [n] 1 where the class is right, else 0.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    targets = torch.nn.functional.one_hot(labels).double()
    right = torch.zeros(len(labels), dtype=torch.float64)
    for fold in order.tensor_split(min(FOLDS, len(labels))):
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[fold] = False
        mean, level, weight = _fit(fitted[rest].double(), targets[rest])
        scores = (tested[fold].double() - mean) @ weight + level
        right[fold] = (scores.argmax(1) == labels[fold]).double()
    return right


def _fit(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of x [n, d], mean of y [n, k], weights [d, k], with the ridge of the least leave-one-out error (PRESS; Allen, 1974)."""
    mean, level = x.mean(0), y.mean(0)
    u, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    projected = u.T @ (y - level)
    unit = float(s.square().sum() / x.shape[1]) or 1.0
    best, weight = float("inf"), torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)
    for ridge in RIDGES:
        kept = s.square() / (s.square() + ridge * unit)
        leverage = (u.square() @ kept + 1 / len(x)).clamp(max=1 - 1e-9)
        left_out = (y - level - u @ (kept[:, None] * projected)) / (1 - leverage)[:, None]
        if (error := float(left_out.square().sum())) < best:
            best, weight = error, v.T @ ((s / (s.square() + ridge * unit))[:, None] * projected)
    return mean, level, weight
