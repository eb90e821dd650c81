"""Linear probe: how well a linear map of a model's embeddings tells classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

FOLDS = 5
RIDGE = 0.1
"""Of the mean variance of an embedding's features: what is added to each."""


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
        x, y = fitted[rest].double(), targets[rest]
        mean, level = x.mean(0), y.mean(0)
        x = x - mean
        gram = x.T @ x
        gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
        weight = torch.linalg.solve(gram, x.T @ (y - level))
        scores = (tested[fold].double() - mean) @ weight + level
        right[fold] = (scores.argmax(1) == labels[fold]).double()
    return right
