"""Mixtures of experts that a model was trained with, as products of groups of rows: found by dataflow, proved by running them.

    rows   = x[token of each row]                                # sorted by expert
    hidden = grouped_mm(rows, w_up[E], ends of the groups)
    out    = grouped_mm(activation(hidden), w_down[E], ends)
    y      = sum over each token's k rows of out * weight        # in the order of the tokens again

How rows are sorted, counted and put back has many spellings. It is not read but tried: random tokens, experts and weights go in, and what
comes out must be the sum above.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import dyncomp.ops  # noqa: F401  (registers dyncomp::routed_ffn)
from dyncomp.graph import Builder, Graph, op_name
from dyncomp.regions.hidden import Hidden, walk_back
from dyncomp.regions.linear import NO_OPS, TRANSPOSES, Linear, Names, aten, permutation, sizes
from dyncomp.regions.partial import ShapeOnly, dominator, evaluate, symbolic_shape
from dyncomp.regions.probe import LAYOUTS, Activation, CannotEvaluate, recognise
from dyncomp.regions.walk import ancestors

_SIZES = {"batch": 2, "sequence": 5}
_FAR = 16  # nodes between the tokens and their rows, or the rows and the result; transformers has up to 6


@dataclass(frozen=True)
class Mixture:
    """``y[t] = sum over j of weights[t, j] * FFN_e(x[t])``, ``e = ids[t, j]``.

    Attributes:
        name: its module path; unique in its graph.
        input: x [N, d]. ids: [N, k] int64, the experts of each token. weights: [N, k]. output: y [N, d_out].
        activation: with the up-projections, as that of an FFN; down: the down-projection. Their weights are [E, in, out] where they are
            ``transposed``, else [E, out, in].
        experts: E. k: experts of each token.
    """

    name: str
    input: fx.Node
    ids: fx.Node
    weights: fx.Node
    output: fx.Node
    activation: Activation
    down: Linear
    experts: int
    k: int


def lift_mixtures(graph: Graph) -> list[str]:
    """Rewrite every mixture to ``dyncomp::routed_ffn``; returns their names.

    before:  the products of groups of rows above
    after:   gates = sum over j of (ids[:, j] == [0 … E - 1]) * weights[:, j]        # [N, E]
             dyncomp.routed_ffn(x, gates, w_up[E], w_down[E])

    The router stays as it is. ``graph.info["routing"]`` notes that the experts were trained, and the share of them that a token runs.
    """
    found = find_mixtures(graph)[0]
    for mixture in found:
        up, down = _up_weights(graph, mixture), _weights(graph, f"{mixture.name}.w_down", [mixture.down])
        with graph.inserting(before=mixture.output, path=mixture.name) as b:
            gates = _gates(b, mixture)
            y = b.call(torch.ops.dyncomp.routed_ffn.default, mixture.input, gates, up, None, down, mixture.activation.name)
        mixture.output.replace_all_uses_with(y)
        graph.info.setdefault("routing", {})[mixture.name] = {"trained": True, "active": mixture.k / mixture.experts}
    if found:
        graph.clean()
    return [mixture.name for mixture in found]


def find_mixtures(graph: Graph) -> tuple[list[Mixture], dict[fx.Node, str]]:
    """The mixtures in graph order, and the products of groups that are in none with the reason."""
    products = {n: product for n in graph.module.graph.nodes if (product := _product(graph, n)) is not None}
    if not products:
        return [], {}
    search, names, found = _Search(graph), Names(), list[Mixture]()
    refused = dict.fromkeys(products, "no second product of groups goes with it")
    for down in products.values():
        hidden = walk_back(graph, products, down)
        nodes = [down.node, *(up.node for up in hidden.ups)]
        if not hidden.ups:
            continue
        mixture = search.mixture(hidden, down, names)
        if isinstance(mixture, str):
            refused.update(dict.fromkeys(nodes, mixture))
            continue
        found.append(mixture)
        for node in nodes:
            refused.pop(node, None)
    return found, refused


def _product(graph: Graph, node: fx.Node) -> Linear | None:
    """``grouped_mm(rows, weight [E, in, out], ends)``, whoever's, with a constant weight."""
    if node.op != "call_function" or "grouped_mm" not in op_name(node) or _ends(node) is None:
        return None
    rows, weight = node.args[:2]
    transposed = True
    while isinstance(weight, fx.Node) and (weight.target in TRANSPOSES or weight.target in NO_OPS):
        if weight.target in TRANSPOSES:
            if permutation(weight, 3) != [0, 2, 1]:
                return None
            transposed = not transposed
        weight = weight.args[0]
    if not isinstance(rows, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr" or graph.tensor(weight).ndim != 3:
        return None
    into, out = graph.tensor(weight).shape[1:] if transposed else graph.tensor(weight).shape[:0:-1]
    return Linear(node, rows, str(weight.target), transposed, None, into, out, -1, (node,))


def _ends(node: fx.Node) -> fx.Node | None:
    """Where the rows of each expert end."""
    ends = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    return ends if isinstance(ends, fx.Node) else None


class _Search:
    """Looks for what is around two products of groups."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.shapes = graph, ShapeOnly(graph)
        self.order = {node: i for i, node in enumerate(graph.module.graph.nodes)}

    def mixture(self, hidden: Hidden, down: Linear, names: Names) -> Mixture | str:
        """The mixture that ends in ``down``, or why it is none."""
        if hidden.problems:
            return hidden.problems[0][0]
        first = hidden.ups[0]
        if len({_ends(p.node) for p in (*hidden.ups, down)}) > 1 or len({p.input for p in hidden.ups}) > 1:
            return "its products do not work on the same groups of rows"
        try:
            activation = recognise(self.graph, hidden.ups, down)
        except CannotEvaluate as error:
            return f"its activation cannot be run on sample values ({error})"
        if activation is None:
            return "its activation is none we know"
        experts = int(self.graph.tensor(down.weight).shape[0])
        problem = "how its rows are sorted is not understood"
        for ids in self._ids(_ends(down.node)):
            tokens, k = sizes(ids) or ()
            for x in self._before(first.input, (tokens, first.in_features)):
                if (trial := _Trial.of(self.graph, x, ids, first, experts)) is None:
                    continue
                problem = "its result is not the sum of each token's experts by its weights"
                for y in _outputs(down.node, (tokens, down.out_features)):
                    for weights in self._before(y, (tokens, k)):
                        if trial.sums(down.node, weights, y):
                            name = names.take(str(down.node.meta.get("path", "")), down.node)
                            return Mixture(name, x, ids, weights, y, activation, down, experts, k)
        return problem

    def _ids(self, ends: fx.Node | None) -> Iterator[fx.Node]:
        """[N, k] int64 that the groups may be made of, nearest first."""
        while ends is not None and ends.op == "call_function":
            value = ends.meta.get("val")
            if isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2 and isinstance(value.shape[1], int):
                yield ends
            ends = dominator(ends, self.order, self.shapes)

    def _before(self, node: fx.Node, shape: tuple[Any, ...]) -> Iterator[fx.Node]:
        """What ``node`` is computed from and has this shape, nearest first."""
        for earlier in ancestors(node, _FAR):
            value = earlier.meta.get("val")
            if isinstance(value, Tensor) and value.is_floating_point() and sizes(earlier) == shape and earlier not in self.shapes:
                yield earlier


def _outputs(down: fx.Node, shape: tuple[Any, ...]) -> Iterator[fx.Node]:
    """What the result may be, from ``down`` on."""
    node = down
    for _ in range(_FAR):
        if sizes(node) == shape:
            yield node
        if len(node.users) != 1:
            return
        node = next(iter(node.users))


@dataclass(frozen=True)
class _Trial:
    """A mixture run on random values.

    Attributes:
        ids: node and values [N, k]. token, expert: [R] of each row.
    """

    graph: Graph
    ids: fx.Node
    chosen: Tensor
    token: Tensor
    expert: Tensor

    @staticmethod
    def of(graph: Graph, x: fx.Node, ids: fx.Node, up: Linear, experts: int) -> _Trial | None:
        """Sorts the rows; None if they are not every token once for each of its experts, together with the others of that expert."""
        generator = torch.Generator().manual_seed(0)
        shape, k = symbolic_shape(graph, x, _SIZES), int(ids.meta["val"].shape[1])
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(x.meta["val"].dtype)
        chosen = torch.rand(shape[0], experts, generator=generator).argsort(-1)[:, :k]
        try:
            rows, ends = evaluate(graph, [up.input, _ends(up.node)], _SIZES, {x: value, ids: chosen.clone()})  # type: ignore[list-item]
        except Exception:  # more is needed than these two: it is no such sorting
            return None
        if tuple(rows.shape) != (shape[0] * k, shape[1]) or tuple(ends.shape) != (experts,):
            return None
        same = (rows[:, None] == value.to(rows.dtype)).all(-1)
        token = same.int().argmax(-1)
        expert = torch.searchsorted(ends.long(), torch.arange(len(rows)), right=True)
        pairs = token * experts + expert
        wanted = (torch.arange(shape[0])[:, None] * experts + chosen).flatten()
        whole = bool(same.any(-1).all()) and torch.equal(pairs.sort().values, wanted.sort().values)
        return _Trial(graph, ids, chosen, token, expert) if whole else None

    def sums(self, down: fx.Node, weights: fx.Node, y: fx.Node) -> bool:
        """Whether ``y`` is the sum of each token's rows of ``down`` by its weights."""
        generator = torch.Generator().manual_seed(1)
        out = torch.randn(len(self.token), int(down.meta["val"].shape[1]), generator=generator).to(down.meta["val"].dtype)
        value = torch.randn(self.chosen.shape, generator=generator).to(weights.meta["val"].dtype)
        try:
            (found,) = evaluate(self.graph, [y], _SIZES, {down: out, self.ids: self.chosen.clone(), weights: value})
        except Exception:  # it depends on something else
            return False
        row = (value[self.token] * (self.chosen[self.token] == self.expert[:, None])).sum(-1)
        expected = torch.zeros(len(value), out.shape[1]).index_add(0, self.token, out.float() * row.float()[:, None])
        tolerance = 1e-5 if out.dtype.itemsize >= 4 else 1e-2
        return found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=tolerance, atol=tolerance)


# ---- the rewrite ---------------------------------------------------------------------------------------------------
def _gates(b: Builder, mixture: Mixture) -> fx.Node:
    """[N, E]: the weights at their experts' places, 0 elsewhere; a sum, so that an expert may be named twice."""
    name, dtype = f"tables.experts_{mixture.experts}", mixture.input.meta["val"].dtype
    b.graph.add_tensor(name, torch.arange(mixture.experts), trainable=False)
    chosen = b.call(aten.eq.Tensor, b.call(aten.unsqueeze.default, mixture.ids, -1), b.graph.read(name))  # [N, k, E]
    chosen = b.call(aten.to.dtype, chosen, dtype)
    weights = b.call(aten.unsqueeze.default, mixture.weights, -1)
    gates = b.call(aten.sum.dim_IntList, b.call(aten.mul.Tensor, chosen, weights), [-2])
    return gates if gates.meta["val"].dtype == dtype else b.call(aten.to.dtype, gates, dtype)


def _up_weights(graph: Graph, mixture: Mixture) -> fx.Node:
    """[E, F, d], or [E, 2F, d] with the rows under the activation first."""
    kind = mixture.activation
    order = None if kind.layout in ("plain", "separate", "gate|up") else LAYOUTS[kind.layout]
    return _weights(graph, f"{mixture.name}.w_up", kind.ups, order)


def _weights(graph: Graph, name: str, parts: Any, order: Any = None) -> fx.Node:
    """The parts one below the other as [E, out, in]: the tensor that is there, if it is just that."""
    if len(parts) == 1 and not parts[0].transposed and order is None:
        return graph.read(parts[0].weight)
    tensors = [graph.tensor(p.weight).detach() for p in parts]
    whole = torch.cat([t.transpose(1, 2) if p.transposed else t for p, t in zip(parts, tensors, strict=True)], 1)
    if order is not None:
        whole = whole[:, torch.cat(order(torch.arange(whole.shape[1])))]
    graph.add_tensor(name, whole.contiguous())
    return graph.read(name)
