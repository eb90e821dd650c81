"""How many inputs each linear layer of a residual block may leave out: TEAL's greedy choice (2408.14690, section 4.3, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.regions import find_regions
from dyncomp.sweep import Sweep

STEP = 0.025
"""Part of a block's weights that one step leaves out."""
WINDOWS = 4
"""Calibration windows that a block's outputs are compared on."""


@dataclass(frozen=True)
class Choice:
    """Sparse linear layers that read the same inputs, and so share thresholds.

    Args:
        nodes: the ``dyncomp.sparse_linear`` nodes.
        thresholds: name of their thresholds in the graph.
        weights: that are read when every input counts.
        cut: (inputs a batch, share) -> [K] thresholds that leave this share of the inputs.
    """

    nodes: tuple[fx.Node, ...]
    thresholds: str
    weights: int
    cut: Callable[[list[Tensor], float], Tensor]

    @property
    def input(self) -> fx.Node:
        return self.nodes[0].args[0]  # type: ignore[return-value]


def block_shares(
    work: Graph, choices: Sequence[Choice], batches: Sequence[dict[str, Tensor]], active: float, tick: Callable[[int, int], None]
) -> list[float]:
    """The share of the inputs that each choice keeps, so that every block reads ``active`` of its weights.

    Block by block, on the dense model's activations: of all choices in the block, the one whose next :data:`STEP` of weights changes the
    residual stream after the block least loses them, until enough are left out. What the change is of a token is held against that
    token's stream: the few with outsized activations would drown all others.

    Args:
        work: a copy of the graph that is sparsified, every threshold below zero, as it will be again afterwards.
        batches: graph inputs; every step computes the block on all of them, once for each choice in it.
        tick: called with (blocks done, blocks).

    Choices that are in no block, in several, or alone in theirs keep ``active``.
    """
    shares = [active] * len(choices)
    blocks = find_regions(work).blocks
    sweep = Sweep(work, batches)
    for position, block in enumerate(blocks):
        inside = sorted(
            (i for i, c in enumerate(choices) if all(block.input < n <= block.output for n in c.nodes)), key=lambda i: choices[i].input
        )
        if len(inside) > 1:
            sweep.advance(block.input)
            found = _greedy(work, sweep, block.output, [choices[i] for i in inside], active)
            for i, share in zip(inside, found, strict=True):
                shares[i] = share
        tick(position + 1, len(blocks))
    return shares


def _greedy(work: Graph, sweep: Sweep, output: fx.Node, choices: Sequence[Choice], active: float) -> list[float]:
    inputs = [sweep.values(c.input) if sweep.has(c.input) else [] for c in choices]
    watch = {c.input: lambda _, x, seen=seen: seen.append(x) for c, seen in zip(choices, inputs, strict=True) if not seen}
    dense = sweep.branch().advance(output, watch=watch)
    sizes = [y.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny) for y in dense]
    every = [torch.full((x[0].shape[-1],), -1.0) for x in inputs]
    thresholds = list(every)
    costs = [c.weights / sum(other.weights for other in choices) for c in choices]
    shares, kept = [1.0] * len(choices), 1.0

    states: list[Sweep] = []  # the block up to each choice's inputs, as the choices before it are now

    def resume(first: int) -> None:
        del states[first:]
        for choice in choices[first:]:
            state = (states[-1] if states else sweep).branch()
            if not state.has(choice.input):
                state.advance(choice.input)
            states.append(state)

    def change(i: int, tried: Tensor) -> float:
        work.add_tensor(choices[i].thresholds, tried, trainable=False)
        outputs = states[i].branch().advance(output)
        work.add_tensor(choices[i].thresholds, thresholds[i], trainable=False)
        return sum(float(((y - d).square().sum(-1) / s).mean()) for y, d, s in zip(outputs, dense, sizes, strict=True))

    resume(0)
    while kept > active + 1e-6:
        step = min(STEP, kept - active, max(s * c for s, c in zip(shares, costs, strict=True)))
        lower = {i: max(s - step / c, 0.0) for i, (s, c) in enumerate(zip(shares, costs, strict=True)) if s * c >= step}
        tried = {i: choices[i].cut(inputs[i], share) for i, share in lower.items()}
        best = min(lower, key=lambda i: change(i, tried[i]))
        shares[best], thresholds[best] = lower[best], tried[best]
        work.add_tensor(choices[best].thresholds, thresholds[best], trainable=False)
        kept -= step
        resume(best + 1)
    for choice, none in zip(choices, every, strict=True):
        work.add_tensor(choice.thresholds, none, trainable=False)
    return shares
