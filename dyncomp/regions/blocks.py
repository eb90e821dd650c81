"""Residual blocks: where what a region computes is added back to the stream it was computed from."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from dyncomp.regions.attention import Attention
from dyncomp.regions.ffn import FFN
from dyncomp.regions.linear import Linear, Names, aten, common_path, sizes
from dyncomp.regions.routed import RoutedFFN

Region = FFN | RoutedFFN | Attention

_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_FORWARD = 48  # nodes from a region's end to its residual add: a norm written out has 6
_BACKWARD = 96  # nodes from a region's start back to the stream: a norm, a projection, a rotary embedding


@dataclass(frozen=True)
class Block:
    """``output = input + regions(…input…)``.

    Attributes:
        name: deepest module path common to its regions and the add, for people; unique in its graph.
        input: the residual stream before, ``output``: the add, the stream after.
        kind: ``"attention"``, ``"ffn"``, or ``"parallel"`` when both read the same stream (GPT-J, Falcon).
        regions: what was added, in graph order.
    """

    name: str
    input: fx.Node
    output: fx.Node
    kind: str
    regions: tuple[Region, ...]


def find_blocks(regions: Sequence[Region], linears: Mapping[fx.Node, Linear]) -> list[Block]:
    """The residual blocks of the given regions, in graph order. A region that is added to nothing is in none."""
    products = {linear.nodes[0]: linear for linear in linears.values()}
    streams: dict[fx.Node, fx.Node] = {}  # residual add -> the stream it adds to
    members: dict[fx.Node, list[Region]] = {}
    for region in sorted(regions, key=lambda r: r.output):
        found = _residual_add(region, products, streams)
        if found is None:
            continue
        stream, add, merged = found
        streams[add] = stream
        before = members.pop(merged) if merged is not None else []
        members.setdefault(add, []).extend([*before, region])
    names = Names()
    return [_block(names, streams[add], add, members[add]) for add in sorted(members)]


def _block(names: Names, stream: fx.Node, add: fx.Node, regions: list[Region]) -> Block:
    kinds = {"attention" if isinstance(r, Attention) else "ffn" for r in regions}
    path = regions[0].path if isinstance(regions[0], Attention) else regions[0].name
    name = path if len(regions) == 1 else common_path(r.output for r in regions)
    return Block(names.take(name, add), stream, add, kinds.pop() if len(kinds) == 1 else "parallel", tuple(regions))


def _residual_add(
    region: Region, products: Mapping[fx.Node, Linear], streams: Mapping[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(stream, add, earlier add it merges with) nearest after the region, or None if it is not added to what it read."""
    origin = _origin(region, products)
    steps = deque([(region.output, isinstance(region, Attention))])
    seen = {region.output}
    while steps and len(seen) < _FORWARD:
        node, may_project = steps.popleft()
        for user in node.users:
            if user in seen or user.op != "call_function":
                continue
            seen.add(user)
            other = _other_operand(user, node)
            if other is not None and _leads_to(other, origin):
                return other, user, None
            if other is not None and other in streams and _leads_to(streams[other], origin):  # x + attention(x), then + ffn(x): one block
                return streams[other], user, other
            if user not in products:
                steps.append((user, may_project))
            elif may_project:  # the output projection belongs to the attention
                steps.append((user, False))
    return None


def _origin(region: Region, products: Mapping[fx.Node, Linear]) -> fx.Node:
    """What the region reads; for an attention, what its queries are projected from."""
    if not isinstance(region, Attention):
        return region.input
    projection = region.projections[0]
    return products[projection].input if projection is not None and projection in products else region.query


def _other_operand(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What an elementwise add of equal shapes adds ``node`` to, or None."""
    if user.target not in _ADDS or user.kwargs or len(user.all_input_nodes) != 2:
        return None
    (other,) = (n for n in user.all_input_nodes if n is not node)
    return other if sizes(other) == sizes(node) else None


def _leads_to(source: fx.Node, result: fx.Node) -> bool:
    """Whether ``result`` is ``source`` or computed from it nearby."""
    steps, seen = [result], {result}
    while steps and len(seen) < _BACKWARD:
        node = steps.pop()
        if node is source:
            return True
        for before in node.all_input_nodes:
            if before not in seen and not before < source:
                seen.add(before)
                steps.append(before)
    return False
