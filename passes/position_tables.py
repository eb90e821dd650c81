"""What depends on the position of a token becomes a table that is looked up at ``positions``.

Rotary cos/sin and learned or sinusoidal position embeddings are computed from the sequence length by every traced
decoder. With a KV cache the positions start elsewhere in each row, so each such tensor is tabulated and gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.ops import rotary
from dyncomp.regions.partial import SHAPE_QUERIES, ShapeOnly, evaluate
from dyncomp.regions.rotary import Rotary, rotary_tables

aten = torch.ops.aten


class NotTabulated(Exception):
    """Why something that depends on the sequence length is not a function of each token's position."""


@dataclass
class PositionTables:
    """Adds position tables to a graph and replaces what they stand for.

    Args:
        graph: changed in place.
        positions: the node with each token's position, i64 [batch, sequence].
        length: P, number of positions to tabulate.
        call: creates a node at the current insertion point.
    """

    graph: Graph
    positions: fx.Node
    length: int
    call: Callable[..., fx.Node]
    names: list[str] = field(default_factory=list)
    _rotary: dict[tuple[object, ...], tuple[str, str]] = field(default_factory=dict)
    _numbers: dict[Hashable, int] = field(default_factory=dict)
    _looked_up: dict[tuple[str, int], fx.Node] = field(default_factory=dict)

    def replace_rotary(self, region: Rotary) -> fx.Node:
        """Put a ``dyncomp.rotary`` node in the place of a recognised region; returns it."""
        key = (tuple(self._computation(n) for n in region.inputs), region.rotated, region.interleaved)
        if key not in self._rotary:
            cos, sin = rotary_tables(self.graph, region, self.length)
            self._rotary[key] = (self._add("rotary_cos", cos), self._add("rotary_sin", sin))
        cos_node, sin_node = (self.graph.read(name) for name in self._rotary[key])
        with self.graph.module.graph.inserting_before(region.result):
            node = self.call(rotary._opoverload, region.source, cos_node, sin_node, self.positions, region.interleaved)
        node.meta["path"] = region.result.meta.get("path", "")
        region.result.replace_all_uses_with(node)
        return node

    def _computation(self, node: fx.Node) -> int:
        """A number for what ``node`` computes: nodes that do the same have the same (each layer spells its own view of the angles)."""
        if node not in self._numbers:
            what: Hashable = node
            if node.op in ("call_function", "get_attr") and node.target not in SHAPE_QUERIES:
                what = (node.op, node.target, repr(fx.map_arg((node.args, node.kwargs), lambda n: f"%{self._computation(n)}")))
            self._numbers[node] = self._numbers.setdefault(what, len(self._numbers))
        return self._numbers[node]

    def replace_rest(self, made: set[fx.Node]) -> None:
        """Tabulate every remaining tensor that depends on the sequence length, where it meets what depends on the tokens.

        Args:
            made: nodes that are not to be looked at.

        Raises:
            NotTabulated: one is not a function of the position; says which.
        """
        shapes, live = ShapeOnly(self.graph), _live(self.graph)
        for node in self.graph.nodes:
            if node in shapes or node in made or node not in live or node.op != "call_function":
                continue
            for source in node.all_input_nodes:
                if source in shapes.varying and isinstance(source.meta.get("val"), Tensor):
                    self._replace_edge(source, node)

    def _replace_edge(self, source: fx.Node, user: fx.Node) -> None:
        where = f"{source.name}, used by {user.name}" + (f" in {user.meta['path']}" if user.meta.get("path") else "")
        axis = self._position_axis(source, where)
        if axis is None:
            return
        rank, shape = user.meta["val"].dim(), self.graph.shape(user)
        batch, sequence = self.graph.inputs[0].shape
        if torch.Tag.pointwise not in getattr(user.target, "tags", ()) or shape is None or shape[0] != batch:
            raise NotTabulated(f"{where} depends on the positions, and is not combined with the tokens elementwise")
        (table,) = self._evaluate(source, 1, self.length)
        lead = rank - table.dim()
        axis += lead
        table = table.reshape((1,) * lead + tuple(table.shape))
        if axis == 0 or shape[axis] != sequence:
            raise NotTabulated(f"{where} depends on the positions along a dimension that is not the sequence")
        name = self._add("position_table", table[0].movedim(axis - 1, 0).contiguous())  # [P, dims before, dims after]
        if (name, axis) not in self._looked_up:  # users come in graph order: what is made before the first is there for all
            weight = self.graph.read(name)
            with self.graph.module.graph.inserting_before(user):
                node = self.call(aten.index.Tensor, weight, [self.positions])  # [B, S, dims before, dims after]
                if axis > 1:
                    order = [0, *range(2, axis + 1), 1, *range(axis + 1, rank)]
                    node = self.call(aten.permute.default, node, order)
            self._looked_up[name, axis] = node
        user.replace_input_with(source, self._looked_up[name, axis])

    def _position_axis(self, source: fx.Node, where: str) -> int | None:
        """The axis along which ``source`` follows the positions, or None when it is the same at every position."""
        (small,), (large,), (single,) = (self._evaluate(source, *size) for size in ((2, 5), (3, 9), (1, 9)))
        axes = [i for i, (a, b) in enumerate(zip(single.shape, self._evaluate(source, 1, 5)[0].shape, strict=True)) if a != b]
        if not axes:
            if small.shape[1:] == large.shape[1:] and torch.equal(small[:1] if small.dim() else small, large[:1] if large.dim() else large):
                return None
            raise NotTabulated(f"{where} depends on the length of the sequence")
        if len(axes) > 1:
            raise NotTabulated(f"{where} depends on pairs of positions")
        axis = axes[0]
        size = min(5, self.length)
        if single.shape[axis] != 9 or not torch.equal(small.narrow(axis, 0, size)[:1], single.narrow(axis, 0, size)[:1]):
            raise NotTabulated(f"{where} changes with the length of the sequence")
        if axis != 0 and bool((large != single).any()):
            raise NotTabulated(f"{where} differs between the rows of a batch")
        first = single.narrow(axis, 0, 1)
        return None if torch.equal(single, first.expand_as(single)) else axis

    def _evaluate(self, node: fx.Node, batch: int, length: int) -> list[Tensor]:
        names = self.graph.inputs[0].shape
        try:
            return evaluate(self.graph, [node], {str(names[0]): batch, str(names[1]): length})
        except IndexError as error:
            raise NotTabulated(f"{node.name} has no entry for position {length - 1}") from error

    def _add(self, stem: str, table: Tensor) -> str:
        for name in self.names:
            known = self.graph.tensor(name)
            if name.startswith(f"tables.{stem}") and known.shape == table.shape and torch.equal(known, table):
                return name
        name = f"tables.{stem}_{sum(n.startswith(f'tables.{stem}') for n in self.names)}"
        self.graph.add_tensor(name, table, trainable=False)
        self.names.append(name)
        return name


def _live(graph: Graph) -> set[fx.Node]:
    """The nodes that the outputs are computed from."""
    found: set[fx.Node] = set()
    stack = list(graph.output_nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
