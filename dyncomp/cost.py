"""What a graph costs: parameters and floating-point operations per token, counted from its nodes.

Counted are the operations whose work is multiply-accumulates, two operations each: linear layers, matrix products,
convolutions, attention, routed experts. Embedding look-ups, norms, softmax and other elementwise work are not, nor is what
depends on the input's size only (position tables, masks) and is the same for every batch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from dyncomp.errors import RequestError
from dyncomp.flops import FLOPS, Sizes
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.models.loaded import WRITES
from dyncomp.regions import Attention, Linear, Regions, find_linears, find_regions
from dyncomp.regions.depth import Skip, find_skips
from dyncomp.regions.linear import Names
from dyncomp.regions.partial import ShapeOnly

WRITTEN = 64
"""Tokens that a model is taken to write for a recording."""
OTHER = "other"
HEAD = "head"


@dataclass(frozen=True)
class RegionCost:
    """The share of one region.

    Attributes:
        kind: ``"ffn"`` (sparsified or not), ``"routed"`` (with its router), ``"attention"`` (with its projections), ``"head"`` or
            ``"other"``.
        parameters: weights it reads; those that several regions read belong to the first.
        active_parameters: of these, the mean number that a token uses.
        flops_per_token: two per multiply-accumulate.
    """

    kind: str
    parameters: int = 0
    active_parameters: float = 0.0
    flops_per_token: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The whole graph; see :class:`RegionCost`. ``by_region`` holds every region by name, and sums up to the totals."""

    parameters: int
    active_parameters: int
    flops_per_token: int
    by_region: dict[str, RegionCost] = field(default_factory=dict)


def count(
    graph: Graph,
    *,
    batch: int = 1,
    sequence: int | None = None,
    active: Mapping[str, float] | None = None,
    regions: Regions | None = None,
) -> Cost:
    """Parameters and operations per token.

    Args:
        graph: dense or routed, on any device.
        batch: size of the dimension of that name; ``sequence``: of every other dynamic dimension, by default 512, or :data:`WRITTEN`
            tokens for a recording. Attention costs grow with it; the causal half is not taken off.
        active: mean fraction, 0 to 1, of the experts that ran, per :class:`~dyncomp.regions.RoutedFFN` name, of the inputs that
            counted, per weight of a ``dyncomp::sparse_linear``, and of the tokens that did not skip, per
            :class:`~dyncomp.regions.depth.Skip` name; 1 where absent, for trained experts what their router opens.
        regions: those of this graph, if they are at hand.

    Returns:
        Operations per token, that is per element of the first input if it holds token ids, otherwise per combination of its
        dynamic dimensions (per image or recording, where only the batch is dynamic): see :func:`flops_unit`.

    Raises:
        RequestError: ``active`` names neither, or is not a fraction.
    """
    regions = find_regions(graph) if regions is None else regions
    facts = graph.info.get("routing", {})
    active = {r.name: facts[r.name].get("active", 1.0) for r in regions.routed if r.trained} | dict(active or {})
    sparse = {node: str(node.args[1].target) for node in sparse_nodes(graph)}  # type: ignore[union-attr]
    skips = find_skips(graph)
    known = [r.name for r in regions.routed] + [s.name for s in skips] + list(sparse.values())
    unknown = sorted(set(active) - set(known))
    if unknown:
        what = f"no routed FFN is called {unknown[0]!r}, nor a sparse weight or a gate of tokens"
        raise RequestError(what, hint=f"those there are: {known}")
    if any(not 0 <= share <= 1 for share in active.values()):
        raise RequestError(f"active fractions lie between 0 and 1, got {active}")
    members = _members(graph, regions)
    gated = _gated_linears(skips)
    fraction = {r.node: active.get(r.name, 1.0) for r in regions.routed} | {n: active.get(w, 1.0) for n, w in sparse.items()}
    fraction |= {n: active.get(s.name, 1.0) * fraction.get(n, 1.0) for n, s in gated.items()}
    owner = {node: name for name, member in members.items() for node in member.nodes}
    flops = dict.fromkeys([*members, OTHER], 0.0)
    size = Sizes(graph, batch, sequence or (WRITTEN if _hears(graph) else 512))
    skipped = ShapeOnly(graph)
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and node.target in FLOPS and node not in skipped:
            flops[owner.get(node, OTHER)] += FLOPS[node.target](node, size) * fraction.get(node, 1.0)
    tokens = size.tokens()
    parts: list[tuple[str, tuple[str | None, ...]]] = [(r.name, (r.w_up, r.b_up, r.w_down)) for r in regions.routed]
    parts += [(weight, (weight,)) for weight in sparse.values()]
    parts += [(s.name, tuple(str(a.target) for a in n.args[2:] if isinstance(a, fx.Node))) for n, s in gated.items() if n not in sparse]
    both = {weight: fraction[node] for node, weight in sparse.items()}  # that of inputs, of the tokens that do not skip
    parameters = _parameters(graph, members, parts, active | both)
    by_region = {
        name: RegionCost(members[name].kind if name in members else OTHER, *parameters[name], flops[name] / tokens) for name in flops
    }
    return Cost(
        sum(r.parameters for r in by_region.values()),
        round(sum(r.active_parameters for r in by_region.values())),
        round(sum(r.flops_per_token for r in by_region.values())),
        by_region,
    )


def flops_unit(graph: Graph) -> str:
    """What operations are counted for."""
    if _hears(graph):
        return f"recording and {WRITTEN} written tokens"
    return {"image-encoder": "image", "seq2seq": "token read and written"}.get(str(graph.info.get("task")), "token")


def _hears(graph: Graph) -> bool:
    return graph.info.get("task") in WRITES and graph.inputs[0].dtype.is_floating_point


# ---- which node and which weight belongs to which region -----------------------------------------------------------
@dataclass(frozen=True)
class _Member:
    kind: str
    nodes: set[fx.Node]
    weights: list[str]


def _members(graph: Graph, regions: Regions) -> dict[str, _Member]:
    linears = find_linears(graph)
    products = {linear.nodes[0]: linear for linear in linears.values()}
    members: dict[str, _Member] = {}
    names = Names()
    for ffn in sorted([*regions.ffns, *regions.sparse_ffns], key=lambda f: f.output):
        members[names.take(ffn.name, ffn.output)] = _Member("ffn", set(ffn.interior), _weights((*ffn.ups, ffn.down)))
    for routed in regions.routed:
        router = [products[n] for n in routed.router if n in products]
        experts = [n for n in (routed.w_up, routed.b_up, routed.w_down, routed.b_down) if n is not None]
        members[names.take(routed.name, routed.node)] = _Member("routed", {routed.node, *routed.router}, experts + _weights(router))
    for attention in regions.attentions:
        nodes = set(_attention_nodes(attention, products))
        members[names.take(attention.path, attention.output)] = _Member(
            "attention", nodes, _weights(products[n] for n in nodes if n in products)
        )
    if regions.head is not None:
        members[HEAD] = _Member("head", set(regions.head.linear.nodes), _weights([regions.head.linear]))
    return members


def _weights(linears: Any) -> list[str]:
    return [name for linear in linears for name in (linear.weight, linear.bias) if name is not None]


def _attention_nodes(attention: Attention, products: Mapping[fx.Node, Linear]) -> Iterator[fx.Node]:
    """The attention and the nearest products around it: its projections, its scores if they are written out, its output projection."""
    yield attention.output
    yield from (p for p in attention.projections if p is not None)
    yield from _nearest(attention.output, lambda n: n.all_input_nodes, lambda n: n.target in FLOPS, steps=48)
    yield from itertools.islice(_nearest(attention.output, lambda n: list(n.users), lambda n: n in products, steps=24), 1)


def _nearest(
    start: fx.Node, neighbours: Callable[[fx.Node], list[fx.Node]], wanted: Callable[[fx.Node], bool], *, steps: int
) -> Iterator[fx.Node]:
    """The first wanted nodes on every way from ``start``."""
    waiting, seen = deque([start]), {start}
    while waiting and len(seen) < steps:
        for node in neighbours(waiting.popleft()):
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            if wanted(node):
                yield node
            else:
                waiting.append(node)


def _gated_linears(skips: list[Skip]) -> dict[fx.Node, Skip]:
    """The linear layers under gates, sparse FFNs' too; other FFNs under gates count as routed."""
    return {node: skip for skip in skips for node in skip.members if node.target is not torch.ops.dyncomp.routed_ffn.default}


def _parameters(
    graph: Graph, members: dict[str, _Member], parts: list[tuple[str, tuple[str | None, ...]]], active: Mapping[str, float]
) -> dict[str, tuple[int, float]]:
    """(all, active) parameters per region; tensors that share storage count once."""
    region_of = {weight: name for name, member in reversed(members.items()) for weight in member.weights}
    share: dict[str, float] = {}
    for name, weights in parts:
        for weight in weights:
            if weight is not None:
                share[weight] = max(share.get(weight, 0.0), active.get(name, 1.0))
    totals = dict.fromkeys([*members, OTHER], (0, 0.0))
    seen: set[int] = set()
    for name, tensor in graph.constants().items():
        key = id(tensor) if tensor.is_meta else tensor.data_ptr()
        if key in seen or not (isinstance(tensor, nn.Parameter) or name in region_of):
            continue
        seen.add(key)
        everything, used = totals[region_of.get(name, OTHER)]
        totals[region_of.get(name, OTHER)] = (everything + tensor.numel(), used + tensor.numel() * share.get(name, 1.0))
    return totals
