"""Running a graph over many batches one segment at a time, so that a pass can look at (and rewrite) each layer in turn.

``torch.fx.Interpreter`` runs one batch through the whole graph. A :class:`Sweep` runs *all* batches up to a node, hands
out that node's values, and goes on from there: through the graph as it is *then*, so what a pass rewrote below is what
the layers above see. Only values that a later node still needs are kept.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.interpret import compute, rounds_activations
from dyncomp.mapped import release, trim
from dyncomp.ops import routed_ffn_reference
from dyncomp.regions.linear import PRODUCTS

aten = torch.ops.aten

# With thousands of tokens and most experts active, computing all experts and masking beats gathering tokens for each:
# the op's plain definition is used here, the gathering one wherever a graph is simply run.
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {torch.ops.dyncomp.routed_ffn.default: routed_ffn_reference}
COSTLY = {*PRODUCTS, aten.scaled_dot_product_attention.default, torch.ops.dyncomp.routed_ffn.default}
"""Where the time goes, and what runs in bfloat16 inside :func:`fast_matmul`; all else sees float32, as the graph was traced ..."""
_BETWEEN = {
    *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.mul.Tensor),
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default),
    *(aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor, aten.clone.default),
}
"""... but these, where they stand between two products: the second would round what they give to bfloat16 in any case."""

PIECE = 1 << 29
"""Bytes of weights that all batches run through before the next ones are read, where weights are in files."""


class Sweep:
    """Breadth-first execution over batches.

    Args:
        graph: may be rewritten between calls of :meth:`advance`, except for nodes that have already run.
        batches: graph inputs by name, one dict a batch.

    Memory: per live node one tensor a batch (between two layers: the residual stream and what :meth:`advance` returned,
    i.e. ``2 * tokens * d_model * 4`` bytes), plus the activations of one batch inside a segment.
    """

    def __init__(self, graph: Graph, batches: Sequence[dict[str, Tensor]]) -> None:
        self.graph = graph
        self._batches = batches
        self._values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._static: dict[tuple, dict[fx.Node, Any]] = {}  # values that depend on shapes only, shared by batches of one shape
        self._static_nodes: set[fx.Node] = set()
        self._done: set[fx.Node] = set()
        self._reduced: dict[fx.Node, tuple[Tensor, Tensor]] = {}  # (value, the same in bfloat16), of weights and of the batch that runs
        for node in graph.placeholders:
            for values, batch in zip(self._values, batches, strict=True):
                values[node] = batch[str(node.target)]
            self._done.add(node)

    @torch.no_grad()
    def advance(
        self, to: fx.Node, *, watch: Mapping[fx.Node, Callable[[int, Tensor], None]] | None = None, tick: Callable[[], None] | None = None
    ) -> list[Tensor]:
        """Run every batch up to and including ``to``; returns its value for each batch.

        Args:
            watch: functions called with (batch index, value) as soon as a node's value is there.
            tick: called after each batch.
        """
        segment = self._segment(to, watch)
        between = self._between(segment, to)
        *before, last = self._pieces(segment)
        for piece in before:
            self._run_all(piece, to, watch or {}, between, None)
        self._run_all(last, to, watch or {}, between, tick)
        return self.values(to)

    @torch.no_grad()
    def each(self, to: fx.Node, *, watch: Mapping[fx.Node, Callable[[int, Tensor], None]] | None = None) -> Iterator[Tensor]:
        """The values of ``to``, made one after the other as they are asked for: nothing is kept, so that the sweep ends there."""
        segment = self._segment(to, watch)
        between = self._between(segment, to)
        *before, last = self._pieces(segment)
        for piece in before:
            self._run_all(piece, to, watch or {}, between, None)
        uses = collections.Counter(map(self._shapes, range(len(self._batches))))
        for index in range(len(self._batches)):
            self._run(last, index, watch or {}, between)
            value = self._lookup(to, index)
            self._values[index] = {}
            shapes = self._shapes(index)
            uses[shapes] -= 1
            if not uses[shapes]:  # pairs have many
                del self._static[shapes]
            yield value

    def values(self, node: fx.Node) -> list[Tensor]:
        """The values of a node that has run and is still needed, one for each batch."""
        return [self._lookup(node, index) for index in range(len(self._batches))]

    def provide(self, node: fx.Node, values: Sequence[Tensor]) -> None:
        """Give the values of a node that has not run, one for each batch, where the caller has them already.

        Neither the node is then run, nor what was only for it.
        """
        for known, value in zip(self._values, values, strict=True):
            known[node] = value
        self._done.add(node)

    def _run_all(
        self, piece: list[fx.Node], to: fx.Node, watch: Mapping[fx.Node, Callable[[int, Tensor], None]], between: set[fx.Node],
        tick: Callable[[], None] | None,
    ) -> None:  # fmt: skip
        for index in range(len(self._batches)):
            self._run(piece, index, watch, between)
            if tick is not None:
                tick()
        self._reduced.clear()
        self._done.update(piece)
        for values in self._values:
            for node in [n for n in values if n is not to and all(u in self._done for u in n.users)]:
                del values[node]

    def branch(self, batches: Sequence[int] | None = None) -> Sweep:
        """Another sweep over all or some of the batches that goes on from here; neither sees what the other computes or is given."""
        chosen = range(len(self._batches)) if batches is None else batches
        other = Sweep(self.graph, [self._batches[i] for i in chosen])
        other._values = [dict(self._values[i]) for i in chosen]
        other._static = {shapes: dict(values) for shapes, values in self._static.items()}
        other._static_nodes, other._done = set(self._static_nodes), set(self._done)
        return other

    def has(self, node: fx.Node) -> bool:
        """Whether :meth:`values` can give this node."""
        return node in self._done and (node in self._static_nodes or all(node in values for values in self._values))

    def _segment(self, to: fx.Node, watch: Mapping[fx.Node, Any] | None = None) -> list[fx.Node]:
        """What has to run up to ``to``, in order."""
        segment = []
        for node in self.graph.module.graph.nodes:
            if node.op == "call_function" and node not in self._done:
                segment.append(node)
                if self._is_static(node):
                    self._static_nodes.add(node)
            if node is to:
                break
        left, needed = set(segment), set[fx.Node]()
        for node in reversed(segment):
            if node is to or node in (watch or ()) or any(u in needed or (u not in left and u not in self._done) for u in node.users):
                needed.add(node)
        self._done.update(left - needed)
        return [node for node in segment if node in needed]

    def _pieces(self, segment: list[fx.Node]) -> list[list[fx.Node]]:
        """The segment; of a model in files in pieces of :data:`PIECE` bytes of weights, so that these are read once for all batches.

        Cut only where as few values are alive as between two layers: two percent of all places, or more, have no more.
        """
        if self.graph.store is None or not segment:
            return [segment]
        alive = self._alive(segment)
        narrow = sorted(alive)[len(alive) // 50]
        pieces: list[list[fx.Node]] = [[]]
        start = 0
        for position, count in enumerate(alive):
            if count <= narrow or position == len(alive) - 1:
                part, start = segment[start : position + 1], position + 1
                if pieces[-1] and self._weight_bytes([*pieces[-1], *part]) > PIECE:
                    pieces.append([])
                pieces[-1] += part
        return pieces

    def _alive(self, segment: list[fx.Node]) -> list[int]:
        """How many values of a batch are wanted later, after each node of the segment."""
        position = {node: i for i, node in enumerate(segment)}
        begun = {node: -1 for values in self._values[:1] for node in values} | position
        changes = [0] * (len(segment) + 1)
        for node, start in begun.items():
            if node not in self._static_nodes:
                changes[max(start, 0)] += 1
                changes[max((position.get(user, len(segment)) for user in node.users if user not in self._done), default=start)] -= 1
        return list(itertools.accumulate(changes[:-1]))

    def _weight_bytes(self, nodes: Iterable[fx.Node]) -> int:
        read = {source for node in nodes for source in node.all_input_nodes if source.op == "get_attr"}
        return sum(t.numel() * t.element_size() for t in map(self.graph.tensor, read))

    def _between(self, segment: list[fx.Node], to: fx.Node) -> set[fx.Node]:
        """Of what has been made of products alone, what only products read."""
        if not bfloat16_allowed() or rounds_activations(self.graph):
            return set()
        made: set[fx.Node] = set()
        for node in segment:
            if node in self._static_nodes or (node.target not in COSTLY and node.target not in _BETWEEN):
                continue
            inputs = [i for i in node.all_input_nodes if i not in self._static_nodes or isinstance(i.meta.get("val"), Tensor)]
            if node.target in COSTLY or all(i in made for i in inputs):
                made.add(node)
        found: set[fx.Node] = set()
        for node in reversed(segment):
            if node in made and node is not to and all(u.target in COSTLY or u in found for u in node.users):
                found.add(node)
        return found

    def _is_static(self, node: fx.Node) -> bool:
        if node.target is aten.sym_size.int:
            return True
        return all(i.op == "get_attr" or i in self._static_nodes for i in node.all_input_nodes)

    def _run(
        self, segment: list[fx.Node], index: int, watch: Mapping[fx.Node, Callable[[int, Tensor], None]], between: set[fx.Node]
    ) -> None:
        values = self._values[index]
        static = self._static.setdefault(self._shapes(index), {})
        left = {node: sum(1 for u in node.users if u not in self._done) for node in [*values, *segment]}
        for node in segment:
            store = static if node in self._static_nodes else values
            if node not in store:
                store[node] = self._compute(node, index, full=node not in between)
            if node in watch:
                watch[node](index, store[node].float() if node in between else store[node])
            trim()
            for source in node.all_input_nodes:
                if source in left:
                    left[source] -= 1
                    if left[source] == 0:
                        values.pop(source, None)
                        self._reduced.pop(source, None)

    def _compute(self, node: fx.Node, index: int, *, full: bool) -> Any:
        costly = node.target in COSTLY and node not in self._static_nodes and bfloat16_allowed()
        reduce = costly and not rounds_activations(self.graph)  # those are rounded first

        def read(source: fx.Node) -> Any:
            value = self._lookup(source, index)
            return self._reduce(source, value) if reduce else value

        args, kwargs = fx.map_arg((node.args, node.kwargs), read)
        if node in self._static_nodes:
            with full_products():
                return compute(self.graph, node, args, kwargs, _IMPLEMENTATIONS)
        with reduced_products() if costly and not reduce else contextlib.nullcontext():
            value = compute(self.graph, node, args, kwargs, _IMPLEMENTATIONS)
        if not costly or not full or value.dtype is not torch.bfloat16:
            return value
        converted = value.float()
        self._reduced[node] = (converted, value)
        return converted

    def _reduce(self, node: fx.Node, value: Any) -> Any:
        """The value as a product takes it; converted once for all that read it."""
        if not isinstance(value, Tensor) or value.dtype is not torch.float32:
            return value
        known, reduced = self._reduced.get(node, (None, None))
        if known is not value:
            reduced = value.to(torch.bfloat16)
            self._reduced[node] = (value, reduced)
        return reduced

    def _shapes(self, index: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(t.shape) for t in self._batches[index].values())

    def _lookup(self, node: fx.Node, index: int) -> Any:
        if node.op == "get_attr":
            return self.graph.tensor(node)
        if node in self._static_nodes:
            return self._static[self._shapes(index)][node]
        return self._values[index][node]


@contextlib.contextmanager
def fast_matmul() -> Iterator[None]:
    """Let float32 matrix products run in bfloat16 with float32 accumulation where the CPU has it (AMX, AVX512-BF16).

    For statistics only (relative error of a product about 2e-3); evaluation runs in float32. On other CPUs nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def bfloat16_allowed() -> bool:
    """Whether products may run in bfloat16: inside :func:`fast_matmul`, on a CPU that has it."""
    return torch.get_float32_matmul_precision() == "medium" and has_bfloat16()


def reduced_products() -> contextlib.AbstractContextManager[Any]:
    """Inside :func:`fast_matmul`: linear layers and attention take and *give* bfloat16, which is up to three times faster than
    float32 tensors that are only multiplied in bfloat16. Sums and norms stay in float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_allowed())


@contextlib.contextmanager
def full_products() -> Iterator[None]:
    """The opposite: for what depends on positions alone, such as rotary angles, which bfloat16 would get wrong."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def release_memory(*, collect: bool = True) -> None:
    """Give back what is no longer used. Called between the stages of long work, and without ``collect`` between its layers.

    The C library keeps freed blocks: each layer's new weights would be put beside them.

    Args:
        collect: look for graphs that nobody holds any more (they refer to themselves), which takes a while.
    """
    if collect:
        gc.collect()
    release()
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
