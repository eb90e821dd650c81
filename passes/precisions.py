"""How many bits each region of a model gets, by what fewer of them cost at the end of the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from dyncomp.passes.budgets import Reference
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.pipeline import Progress
from dyncomp.quantized import Quantized
from dyncomp.sweep import Sweep

FLOAT = 32
"""Bits of a weight that stays as it is."""
_BINS = 16_384


@dataclass(frozen=True)
class Unit:
    """Weights that one kernel reads, and that therefore get the same precision.

    Attributes:
        name: for people.
        weights: their names.
        size: how many numbers they hold.
    """

    name: str
    weights: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Mix:
    """A precision for each unit.

    Attributes:
        bits: of each unit, by its name.
        stored: mean bits a weight as a file holds them, scales and offsets included.
        predicted: the sum of the units' losses, each measured alone.
        measured: the loss with all of them quantized.
    """

    bits: dict[str, int]
    stored: float
    predicted: float
    measured: float


class Trials:
    """Quantizes some units of a graph for a moment, and measures what that costs at its end.

    The loss is the mean KL divergence to the graph as it was, in nats a token (models that write tokens), or the squared error of the
    outputs, relative to their square (others).

    Args:
        graph: unchanged after each measurement; weights are read as [N, K] by the operators that :func:`~dyncomp.passes.quantize` knows.
        encode: (name of a weight, bits) -> the weight in so many bits.
        batches: what is measured on.
    """

    def __init__(self, graph: Graph, encode: Callable[[str, int], Quantized], batches: Sequence[dict[str, Tensor]]) -> None:
        self.graph, self._encode, self._batches = graph, encode, batches
        outputs = self._sweep().advance(graph.output_nodes[0])
        kind = Reference if graph.info.get("task") in WRITES else _Outputs
        self._expected = [kind(y) for y in outputs]

    def each(self, units: Sequence[Unit], choices: Sequence[int], progress: Progress) -> dict[str, dict[int, float]]:
        """The loss of each unit alone in each of ``choices`` bits. What is before a unit is computed once.

        The fewest bits are measured; another bit halves the errors of rounding, and the loss grows with their square.
        """
        nodes = self.graph.nodes
        order = {node: i for i, node in enumerate(nodes)}
        first = {unit.name: min(order[n] for n in self._readers(unit)) for unit in units}
        sweep, reached = self._sweep(), -1
        losses: dict[str, dict[int, float]] = {}
        fewest = min(choices)
        for unit in sorted(units, key=lambda u: first[u.name]):
            before = next((i for i in range(first[unit.name] - 1, -1, -1) if nodes[i].op == "call_function"), -1)
            if before > reached:
                sweep.advance(nodes[before])
                reached = before
            loss = self._loss(sweep.branch(), {unit: fewest})
            losses[unit.name] = {b: loss * 0.25 ** (b - fewest) if b != FLOAT else 0.0 for b in choices}
            progress("precisions", len(losses), len(units))
        return losses

    def together(self, units: Sequence[Unit], bits: Mapping[str, int]) -> float:
        """The loss with each unit in the bits that are given for it."""
        return self._loss(self._sweep(), {unit: bits[unit.name] for unit in units})

    def _sweep(self) -> Sweep:
        return Sweep(self.graph, self._batches)

    @torch.no_grad()
    def _loss(self, sweep: Sweep, bits: Mapping[Unit, int]) -> float:
        chosen = {name: b for unit, b in bits.items() for name in unit.weights if b != FLOAT}
        with _replaced(self.graph, {name: self._encode(name, b) for name, b in chosen.items()}):
            outputs = sweep.advance(self.graph.output_nodes[0])
        return sum(e.divergence(y) for e, y in zip(self._expected, outputs, strict=True)) / len(outputs)

    def _readers(self, unit: Unit) -> Iterator[fx.Node]:
        names = {alias for name in unit.weights for alias in aliases(self.graph, name)}
        return (user for node in self.graph.nodes if node.op == "get_attr" and node.target in names for user in node.users)


class _Outputs:
    """The outputs of a model that predicts no tokens, to compare others with."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def divergence(self, other: Tensor) -> float:
        return float((other - self._value).square().sum() / self._value.square().sum())


def aliases(graph: Graph, name: str) -> list[str]:
    """Every name of a tensor that the graph reads, ``name`` among them: tied weights go by several."""
    storage = graph.tensor(name).data_ptr()
    return [other for other, tensor in graph.constants().items() if tensor.data_ptr() == storage]


@contextlib.contextmanager
def _replaced(graph: Graph, values: Mapping[str, Quantized]) -> Iterator[None]:
    before: dict[str, Tensor] = {}
    try:
        for name, value in values.items():
            shared = aliases(graph, name)
            before |= {other: graph.tensor(other) for other in shared}
            graph.add_quantized(name, value)
            for other in shared:
                if other != name:
                    graph.add_alias(other, name)
        yield
    finally:
        for name, tensor in before.items():
            graph.add_tensor(name, tensor.detach(), trainable=isinstance(tensor, torch.nn.Parameter))


def choose(
    trials: Trials,
    units: Sequence[Unit],
    losses: Mapping[str, Mapping[int, float]],
    stored: Callable[[int], float],
    *,
    mean: float | None,
    limit: float,
) -> Mix:
    """The mix with the least loss at ``mean`` bits a weight, or (None) the smallest one that loses at most ``limit``.

    Losses of units are taken to add up. Whether they do is measured: while the mix loses more than ``limit``, a stricter one is made.

    Args:
        losses: unit -> bits -> loss, see :meth:`Trials.each`.
        stored: bits -> bits of a weight as a file holds it.
    """
    total = sum(unit.size for unit in units)
    sizes = {unit.name: {b: stored(b) * unit.size for b in losses[unit.name]} for unit in units}

    def mix(bits: dict[str, int]) -> Mix:
        size = sum(sizes[name][b] for name, b in bits.items())
        return Mix(bits, size / total, sum(losses[name][b] for name, b in bits.items()), trials.together(units, bits))

    if mean is not None:
        return mix(allocate(sizes, losses, size=mean * total))
    allowed = limit
    for _ in range(4):
        found = mix(allocate(sizes, losses, loss=allowed))
        if found.measured <= limit:
            return found
        allowed *= 0.9 * limit / found.measured
    return mix({name: max(choices) for name, choices in losses.items()})


def allocate(
    sizes: Mapping[str, Mapping[int, float]],
    losses: Mapping[str, Mapping[int, float]],
    *,
    size: float | None = None,
    loss: float | None = None,
) -> dict[str, int]:
    """One choice for each unit: the least sum of losses within ``size``, or the least size within a sum of losses.

    The multiple-choice knapsack by dynamic programming; what units need beyond their smallest choices is rounded up to one of
    :data:`_BINS` steps.

    Args:
        sizes, losses: unit -> choice -> value, with the same choices.

    Returns:
        unit -> choice; where no choice keeps within ``loss``, the one that loses least.
    """
    smallest = {name: min(choices.values()) for name, choices in sizes.items()}
    room = sum(max(choices.values()) - smallest[name] for name, choices in sizes.items())
    step = room / _BINS or 1.0
    steps = _BINS + len(sizes)  # each unit is rounded up by less than one
    best = torch.zeros(steps + 1, dtype=torch.float64)  # least loss of the units so far within so many steps
    taken = []
    for name, choices in sizes.items():
        options = []
        for choice, value in choices.items():
            shift = math.ceil((value - smallest[name]) / step - 1e-9)
            shifted = torch.full_like(best, math.inf)
            shifted[shift:] = best[: steps + 1 - shift]
            options.append(shifted + losses[name][choice])
        best, index = torch.stack(options).min(0)
        taken.append((name, list(choices), index))
    if size is not None:
        left = min(math.floor((size - sum(smallest.values())) / step + 1e-9), steps)
        if left < 0:
            raise ValueError(f"even the smallest choices need {sum(smallest.values()):g}")
    else:
        enough = (best <= (loss or 0.0)).nonzero()
        left = int(enough[0]) if len(enough) else int(best.argmin())
    found = {}
    for name, known, index in reversed(taken):
        found[name] = known[int(index[left])]
        left -= math.ceil((sizes[name][found[name]] - smallest[name]) / step - 1e-9)
    return {name: found[name] for name in sizes}


def require_reachable(trials: Trials, units: Sequence[Unit], choices: Sequence[int], limit: float) -> None:
    """Raise RequestError when even the most bits for every unit lose more than ``limit``."""
    if FLOAT in choices:
        return
    most = max(choices)
    if (loss := trials.together(units, {unit.name: most for unit in units})) > limit:
        raise RequestError(
            f"quantize: {most} bits everywhere lose {loss:.4f} on the calibration text, and at most {limit:g} is allowed",
            hint=f"raise max-loss, or let regions stay in float: mixed={'+'.join(map(str, choices))}+{FLOAT}",
        )
