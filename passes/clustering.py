"""Balanced partitions of an FFN's neurons into experts of equal size."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from dyncomp.errors import RequestError


def expert_size(neurons: int, experts: int) -> int:
    """Neurons of each expert.

    Raises:
        RequestError: the experts do not divide the FFN width; names numbers near it that do.
    """
    if experts < 1 or neurons % experts:
        near = [e for e in range(1, neurons + 1) if neurons % e == 0]
        best = sorted(near, key=lambda e: abs(e - experts))[:4]
        raise RequestError(
            f"{experts} experts do not divide the FFN width {neurons}", hint=f"use one of {', '.join(map(str, sorted(best)))} experts"
        )
    return neurons // experts


def random_partition(neurons: int, experts: int, *, seed: int = 0) -> Tensor:
    """A random balanced partition: [experts, neurons / experts] neuron indices."""
    expert_size(neurons, experts)
    return torch.randperm(neurons, generator=torch.Generator().manual_seed(seed)).view(experts, -1).sort(1).values


def partition_neurons(features: Tensor, experts: int, *, rate: Tensor | None = None, shared: int = 0, seed: int = 0) -> Tensor:
    """Neurons by cosine of their features; the first ``shared`` experts hold those with the highest rates.

    Args:
        features: [neurons, r]. rate: [neurons], where experts are shared.

    Returns:
        [experts, neurons / experts] neuron indices.
    """
    features = features / features.norm(dim=1, keepdim=True).clamp_min(1e-6)
    if not shared or rate is None:
        return balanced_kmeans(features, experts, seed=seed)
    size = expert_size(len(features), experts)
    order = rate.argsort(descending=True, stable=True)
    common, rest = order[: shared * size], order[shared * size :].sort().values
    return torch.cat([common.view(shared, size), rest[balanced_kmeans(features[rest], experts - shared, seed=seed)]])


def balanced_kmeans(features: Tensor, experts: int, *, seed: int = 0, iterations: int = 6) -> Tensor:
    """k-means with clusters of equal size (as MoEfication, 2110.01786, and CMoE, 2502.04416, use it).

    Args:
        features: [neurons, r], compared by Euclidean distance; normalise rows for cosine.
        experts: number of clusters; must divide the number of neurons.
        iterations: rounds of assignment. All but the last assign greedily, the neuron that would lose most by its second
            choice first; the last solves the assignment problem exactly (Jonker-Volgenant).

    Returns:
        [experts, neurons / experts] neuron indices, ascending within an expert.
    """
    neurons = features.shape[0]
    size = expert_size(neurons, experts)
    generator = torch.Generator().manual_seed(seed)
    centers = _spread_centers(features, experts, generator)
    squares = features.square().sum(1, keepdim=True)
    assignment = torch.zeros(neurons, dtype=torch.long)
    for step in range(iterations):
        distance = squares - 2 * features @ centers.T + centers.square().sum(1)  # [neurons, experts]
        assignment = _assign_exactly(distance, size) if step == iterations - 1 else _assign_greedily(distance, size)
        centers = torch.zeros_like(centers).index_add_(0, assignment, features) / size
    return torch.stack([(assignment == e).nonzero().squeeze(1) for e in range(experts)])


def _spread_centers(features: Tensor, experts: int, generator: torch.Generator) -> Tensor:
    """k-means++ initialisation (Arthur and Vassilvitskii, 2007)."""
    chosen = [int(torch.randint(features.shape[0], (1,), generator=generator))]
    distance = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < experts:
        chosen.append(int(torch.multinomial(distance.clamp_min(1e-12), 1, generator=generator)))
        distance = torch.minimum(distance, (features - features[chosen[-1]]).square().sum(1))
    return features[chosen].clone()


def _assign_greedily(distance: Tensor, size: int) -> Tensor:
    ordered = distance.sort(1)
    choices = ordered.indices.tolist()
    regret = (ordered.values[:, 1] - ordered.values[:, 0]) if distance.shape[1] > 1 else ordered.values[:, 0]
    room = [size] * distance.shape[1]
    assignment = [0] * distance.shape[0]
    for neuron in regret.argsort(descending=True).tolist():
        cluster = next(c for c in choices[neuron] if room[c])
        room[cluster] -= 1
        assignment[neuron] = cluster
    return torch.tensor(assignment)


def _assign_exactly(distance: Tensor, size: int) -> Tensor:
    _, columns = linear_sum_assignment(distance.double().numpy().repeat(size, axis=1))
    return torch.from_numpy(columns // size)
