"""Running a graph so that it trains: all experts at once, weights that are not the graph's own, gradient checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from dyncomp.graph import Graph
from dyncomp.ops import gated_linear_reference, routed_ffn_reference, sparse_linear_reference
from dyncomp.regions import find_regions, find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.hidden import is_pointwise
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.sweep import COSTLY

aten = torch.ops.aten


class _RMSNorm(torch.autograd.Function):
    """``x * rsqrt(mean(x²) + eps) * weight`` with a backward of a few operations (composed, its autograd takes a dozen)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.float()
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        normed = x * inverse
        scaled = grad * weight
        into_weight = (grad * normed).flatten(0, -2).sum(0)
        mean = (scaled * normed).mean(-1, keepdim=True)
        return scaled.sub_(normed.mul_(mean)).mul_(inverse), into_weight, None


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    if weight is None or eps is None or len(shape) != 1 or x.dtype not in (torch.float32, torch.bfloat16):
        return aten.rms_norm.default(x, shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


# Plain ATen, which autocast sees through, also in the gradient. As in a sweep: with hundreds of tokens and most experts active, computing
# all experts and masking beats gathering tokens for each; and the gradient of a gate needs what it closes anyway.
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.dyncomp.routed_ffn.default: routed_ffn_reference,
    torch.ops.dyncomp.gated_linear.default: gated_linear_reference,
    torch.ops.dyncomp.sparse_linear.default: sparse_linear_reference,
    aten.rms_norm.default: _rms_norm,
}


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class Program:
    """A graph as a differentiable function of weights that are handed in.

    Args:
        graph: is not changed; nodes of it can be watched.
        weight: the tensor to use for a constant's name; the graph's own by default.
        trained: names of the constants that change from run to run.
        bfloat16: products in bfloat16 (autocast), routers in float32 (Switch, 2101.03961, section 2.4): which gates open hangs on small
            differences.
        checkpoints: keep only the residual stream between layers for the backward pass and compute the rest again: about a
            third more work, a fraction of the memory.
    """

    def __init__(
        self, graph: Graph, weight: Callable[[str], Tensor] | None = None, *, trained: Sequence[str] = (), bfloat16: bool = False,
        checkpoints: bool = False,
    ) -> None:  # fmt: skip
        self._bfloat16, self._checkpoints = bfloat16, checkpoints
        self.graph = graph.copy()
        fuse_rms_norms(self.graph, fold=False)
        self._weight = weight or (lambda name: self.graph.tensor(name).detach())
        changing = set(trained)
        self._static: set[fx.Node] = set()  # depend on shapes only: masks, rotary tables
        self._known: dict[tuple, dict[fx.Node, Any]] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                if str(node.target) not in changing:
                    self._static.add(node)
            elif node.op == "call_function" and (node.target is aten.sym_size.int or all(n in self._static for n in node.all_input_nodes)):
                self._static.add(node)
        self._dynamic = [n for n in self.graph.nodes if n.op == "call_function" and n not in self._static]
        self._routers = {n for r in find_routed(self.graph) for n in r.router} | {s.scores for s in find_skips(self.graph)}
        self._half = self._products() if bfloat16 else {}
        self._end, self._last = self._split()
        self._dynamic = [n for n in self._dynamic if n not in self._last]
        self._constants = {n: self._weight(str(n.target)) for m in self._last for n in m.all_input_nodes if n.op == "get_attr"}
        self._segments = self._cut() if checkpoints else [self._dynamic]

    def __call__(
        self, inputs: dict[str, Tensor], watch: Sequence[fx.Node] = (), change: Mapping[fx.Node, Callable[[Tensor], Tensor]] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The states that :meth:`finish` makes the first output of, and the values of the watched nodes (of :attr:`graph`).

        Args:
            change: what becomes of the values of some nodes.
        """
        self._change = dict(change or {})
        env: dict[fx.Node, Any] = {node: inputs[str(node.target)] for node in self.graph.placeholders}
        wanted = {*watch, self._end}
        known = self._shape_dependent(env)  # positions and angles are not rounded
        with self._cast():
            for segment in self._segments:
                self._run(segment, env, known, wanted)
        return env[self._end], [env[n] for n in watch]

    def finish(self, states: Tensor) -> Tensor:
        """What the program gives, of some tokens' states [n, d]: logits [n, V] where it ends with a vocabulary head, else the states."""
        env: dict[fx.Node, Any] = {self._end: states}
        with self._cast():
            for node in self._last:
                env[node] = self._compute(node, env, self._constants)
        return env[self.graph.output_nodes[0]]

    def find(self, name: str) -> fx.Node:
        """The node of :attr:`graph` with this name: nodes keep their names in the copy that is run."""
        return next(n for n in self.graph.nodes if n.name == name)

    # ---- running -----------------------------------------------------------------------------------------------------
    def _cast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self._bfloat16 else contextlib.nullcontext()

    def _split(self) -> tuple[fx.Node, list[fx.Node]]:
        """(the node whose value a run gives, the nodes that make the first output of it): a vocabulary head and what acts on each logit
        alone, where none of it is trained."""
        output, head = self.graph.output_nodes[0], find_regions(self.graph).head
        if head is None or head.node.target is not aten.linear.default:
            return output, []
        last, node = [], output
        while node is not head.node and is_pointwise(node.target) and len(sources := self._changing(node)) == 1:
            last.append(node)
            (node,) = sources
        alone = node is head.node and self._changing(node) == {head.input}
        return (head.input, [head.node, *reversed(last)]) if alone else (output, [])

    def _changing(self, node: fx.Node) -> set[fx.Node]:
        """What ``node`` reads that is not the same in every run."""
        return {n for n in node.all_input_nodes if n.op != "get_attr" or n not in self._static}

    def _products(self) -> dict[fx.Node, Tensor]:
        """In bfloat16, the weights of products that are not trained: autocast would round them again each time they are used."""
        weights = {n.args[1] for n in self._dynamic if n.target is aten.linear.default and n not in self._routers}
        kept = [w for w in weights if isinstance(w, fx.Node) and w.op == "get_attr" and w in self._static]
        return {w: self._weight(str(w.target)).bfloat16() for w in kept}

    def _shape_dependent(self, env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        key = tuple(tuple(t.shape) for t in env.values())
        if key not in self._known:
            known: dict[fx.Node, Any] = {}
            with torch.no_grad():
                for node in self.graph.nodes:
                    if node in self._static:
                        known[node] = self._weight(str(node.target)) if node.op == "get_attr" else self._compute(node, known, env)
            used = {i for n in self._dynamic for i in n.all_input_nodes} | set(self.graph.output_nodes)
            self._known[key] = {n: v for n, v in known.items() if n in used}
        return self._known[key]

    def _compute(self, node: fx.Node, *environments: dict[fx.Node, Any]) -> Any:
        def value(n: fx.Node) -> Any:
            if n in self._half and node.target is aten.linear.default:
                return self._half[n]
            if n.op == "get_attr" and n not in self._static:
                return self._weight(str(n.target))
            return next(e[n] for e in environments if n in e)

        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if self._bfloat16 and node in self._routers:
            args, kwargs = tree_map(_in_float32, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return node.target(*args, **kwargs)  # type: ignore[operator]
        return _IMPLEMENTATIONS.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]

    def _run(self, segment: list[fx.Node], env: dict[fx.Node, Any], known: dict[fx.Node, Any], wanted: set[fx.Node]) -> None:
        inside = set(segment)
        results = [n for n in segment if n in wanted or any(u not in inside for u in n.users)]
        sources = list(dict.fromkeys(i for n in segment for i in n.all_input_nodes if i in env))

        def body(*values: Any) -> tuple[Any, ...]:
            local = dict(zip(sources, values, strict=True))
            left = {n: len(n.users) for n in segment}
            for node in segment:
                local[node] = self._compute(node, local, known)
                if node in changes:
                    local[node] = changes[node](local[node])
                for source in node.all_input_nodes:
                    if source in left:
                        left[source] -= 1
                        if left[source] == 0 and source not in keep:
                            del local[source]
            return tuple(local[n] for n in results)

        keep, changes = set(results), self._change  # a backward pass computes checkpointed segments again
        values = [env[n] for n in sources]
        if self._checkpoints and torch.is_grad_enabled():
            found = torch.utils.checkpoint.checkpoint(body, *values, use_reentrant=False)
        else:
            found = body(*values)
        for node in [n for n in sources if n.op == "call_function" and n not in wanted and all(u in inside for u in n.users)]:
            del env[node]
        env.update(zip(results, found, strict=True))

    def _cut(self) -> list[list[fx.Node]]:
        """Segments between which one tensor alone is alive: about a layer's attention or FFN each."""
        position = {n: i for i, n in enumerate(self._dynamic)}
        last = {n: max((position.get(u, len(position)) for u in n.users), default=position[n]) for n in self._dynamic}
        segments: list[list[fx.Node]] = [[]]
        alive: set[fx.Node] = set()
        for index, node in enumerate(self._dynamic):
            segments[-1].append(node)
            alive = {n for n in alive | {node} if last[n] > index}
            products = sum(1 for n in segments[-1] if n.target in COSTLY)
            if len(alive) == 1 and products >= 2:
                segments.append([])
        return [s for s in segments if s]
