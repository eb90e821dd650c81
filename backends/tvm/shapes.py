"""The kernels that have parameters, by the shapes they are called with: how each is built, given weights, and held against PyTorch."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from dyncomp.backends.tvm import ops
from dyncomp.backends.tvm.kernels.linear import linear
from dyncomp.backends.tvm.kernels.routed_ffn import routed_ffn
from dyncomp.backends.tvm.kernels.tile import Tile, pack, pack_experts, pad_rows
from torch import Tensor

import dyncomp.ops
from dyncomp.graph import Graph

Tensors = tuple[Tensor, ...]
ACTIVE = 0.5
"""Of the (token, expert) pairs that a routed FFN is timed on."""


@dataclass(frozen=True)
class LinearShape:
    """``linear(x [M, depth], W [rows, depth], b)``."""

    kernel: ClassVar[str] = "linear"

    rows: int
    depth: int

    @property
    def width(self) -> int:
        """Outputs that are divided into panels."""
        return self.rows

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return 4 * self.rows * self.depth

    def allows(self, tile: Tile) -> bool:
        return self.depth % tile.parts == 0

    def depth_of(self, tile: Tile) -> int:
        """The sums that ``tile.parts`` divides."""
        return self.depth

    def build(self, tile: Tile) -> Any:
        return linear(self.rows, self.depth, tile)

    def weights(self, generator: torch.Generator) -> Tensors:
        return _random(generator, self.rows, self.depth), _random(generator, self.rows)

    def packed(self, weights: Tensors, tile: Tile) -> Tensors:
        return pack(weights[0], tile), pad_rows(weights[1], tile)

    def inputs(self, tokens: int, generator: torch.Generator) -> Tensors:
        return (_random(generator, tokens, self.depth),)

    def reference(self, inputs: Tensors, weights: Tensors) -> Tensor:
        return torch.nn.functional.linear(*inputs, *weights)


@dataclass(frozen=True)
class FFNShape:
    """``routed_ffn`` of E experts of F neurons each, from ``depth`` to ``rows`` features."""

    kernel: ClassVar[str] = "routed_ffn"

    experts: int
    neurons: int
    depth: int
    rows: int
    activation: str
    gated: bool

    @property
    def width(self) -> int:
        return self.neurons * (2 if self.gated else 1)

    @property
    def bytes(self) -> int:
        return 4 * self.experts * self.neurons * (self.depth * (2 if self.gated else 1) + self.rows)

    def allows(self, tile: Tile) -> bool:
        return tile.split == 1 and not (self.gated and tile.vectors % 2) and self.depth_of(tile) % tile.parts == 0

    def depth_of(self, tile: Tile) -> int:
        given = tile.width // 2 if self.gated else tile.width
        return -(-self.neurons // given) * given

    def build(self, tile: Tile) -> Any:
        return routed_ffn(self.experts, self.neurons, self.depth, self.rows, self.activation, gated=self.gated, tile=tile)

    def weights(self, generator: torch.Generator) -> Tensors:
        up = _random(generator, self.experts, self.width, self.depth) / self.depth**0.5
        return up, _random(generator, self.experts, self.width), _random(generator, self.experts, self.rows, self.neurons)

    def packed(self, weights: Tensors, tile: Tile) -> Tensors:
        return pack_experts(*weights, tile)

    def inputs(self, tokens: int, generator: torch.Generator) -> Tensors:
        """x, and gates that let the same number of experts of each token run."""
        scores = torch.rand(tokens, self.experts, generator=generator)
        chosen = scores.topk(max(1, round(ACTIVE * self.experts)), -1).indices
        return _random(generator, tokens, self.depth), torch.zeros_like(scores).scatter(-1, chosen, 1.0)

    def reference(self, inputs: Tensors, weights: Tensors) -> Tensor:
        result: Tensor = dyncomp.ops.routed_ffn(*inputs, *weights, self.activation)
        return result


Shape = LinearShape | FFNShape
SHAPES: dict[str, type[LinearShape] | type[FFNShape]] = {c.kernel: c for c in (LinearShape, FFNShape)}


def describe(shape: Shape) -> str:
    """For people: ``960 x 576``, ``16 x 96, 576 -> 576, silu``."""
    if isinstance(shape, LinearShape):
        return f"{shape.rows} x {shape.depth}"
    return f"{shape.experts} x {shape.neurons}, {shape.depth} -> {shape.rows}, {'gated ' if shape.gated else ''}{shape.activation}"


@dataclass(frozen=True)
class Tiles:
    """The tile of every kernel: the machine's own, or what tuning found for its shape."""

    default: Tile
    tuned: dict[Shape, Tile] = field(default_factory=dict)

    def of(self, shape: Shape) -> Tile:
        return self.tuned.get(shape, self.default)

    def used(self, selected: Graph) -> list[dict[str, Any]]:
        """What differs from the default in a selected graph, for ``config.json``."""
        return [
            {"kernel": s.kernel, "shape": dataclasses.asdict(s), "parameters": parameters(self.tuned[s])}
            for s in called(selected)
            if s in self.tuned
        ]


def parameters(tile: Tile) -> dict[str, int]:
    """What can be chosen; the vector width is the machine's."""
    return {name: value for name, value in dataclasses.asdict(tile).items() if name != "lanes"}


def called(selected: Graph) -> Counter[Shape]:
    """The shapes in a selected graph, and how many calls of each there are."""
    return Counter(shape for shape, _ in _calls(selected))


def tokens_of(selected: Graph, *sizes: dict[str, int]) -> dict[Shape, tuple[int, ...]]:
    """How many tokens each shape is called with, for each of some sizes of the graph's dimensions; 1 for those not given."""
    found: dict[Shape, set[int]] = {}
    names = selected.dimension_names()
    for shape, x in _calls(selected):
        for size in sizes:
            tokens = 1
            for dim in x.shape[:-1]:
                tokens *= dim if isinstance(dim, int) else _evaluate(dim, names, size)
            found.setdefault(shape, set()).add(tokens)
    return {shape: tuple(sorted(tokens)) for shape, tokens in found.items()}


def _evaluate(dim: torch.SymInt, names: dict[str, str], sizes: dict[str, int]) -> int:
    expression = dim.node.expr
    return int(expression.subs({s: sizes.get(names.get(str(s), ""), 1) for s in expression.free_symbols}))


def _calls(selected: Graph) -> Iterator[tuple[Shape, Tensor]]:
    for node in selected.nodes:
        if node.target not in (ops.linear, ops.routed_ffn):
            continue
        arguments: tuple[Any, ...] = node.args
        x = arguments[0].meta["val"]
        if node.target is ops.linear:
            yield LinearShape(arguments[3], x.shape[-1]), x
        else:
            neurons, rows, activation, gated = arguments[5:]
            yield FFNShape(arguments[2].meta["val"].shape[0], neurons, x.shape[-1], rows, activation, gated), x


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)
