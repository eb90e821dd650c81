"""Keeping tokens apart from where they are taken to the end of their layer, so that gathering them is paid once."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.backends.ort import ops
from torch import Tensor, fx

from dyncomp.graph import Builder, Graph

aten = torch.ops.aten
_NORMS = {aten.rms_norm.default, aten.layer_norm.default}


def join_rows(graph: Graph) -> None:
    """Let tokens that compute a layer and tokens that skip it go their own ways through it.

    before:  s = x + put(o, gates) + put(z, 1 - gates);  y = s + put(f(take(norm(s), gates)), gates) + put(g(take(…)), 1 - gates)
    after:   s0 = take(x, gates) + o; s1 = take(x, 1 - gates) + z;  y = merge(s0 + f(norm(s0)), s1 + g(…s1…), gates, 1 - gates)

    Between the first and the last operation under the same gates only residual additions and norms lie, which treat every token alike.
    Where all tokens' values are needed in between (the keys of the next layer, under the gates of an early exit) they are merged, and taken
    again after that.
    """
    for gates in dict.fromkeys(_open(n) for n in graph.nodes if n.target is ops.put_rows):
        plan, cuts = _plan(graph, gates)
        if plan:
            _Join(graph, gates, plan, cuts).run()
    graph.clean()


def _open(node: fx.Node) -> Any:
    """The gates of a mark, or what they are the complement of."""
    gates: Any = node.args[1]
    return gates.args[0] if gates.target is aten.rsub.Scalar else gates


def _plan(graph: Graph, gates: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """The marks, additions and norms whose tokens are kept apart; and of these the ones that are merged for all that reads them."""
    puts = [n for n in graph.nodes if n.target is ops.put_rows and _open(n) is gates]
    takes = {n for n in graph.nodes if n.target is ops.take_rows and _open(n) is gates}
    after = set(puts)
    for node in graph.nodes:
        if _alike(node) and any(n in after for n in node.all_input_nodes):
            after.add(node)
    leads = {n for t in takes for n in t.all_input_nodes if n in after}
    for node in reversed(graph.nodes):
        if node in after and node.target is not ops.put_rows and any(u in leads for u in node.users):
            leads.add(node)
    plan = {n for n in after if n in leads and n.target is not ops.put_rows} | set(puts)
    for node in graph.nodes:  # sums of what is apart on both sides
        if node.target is aten.add.Tensor and node not in plan and all(isinstance(a, fx.Node) and a in plan for a in node.args):
            plan.add(node)
    cuts: set[fx.Node] = set()

    def cut(node: Any) -> None:
        if node.target in _NORMS and node.args[0] in plan:  # of all tokens, rather than twice
            plan.remove(node)
            node = node.args[0]
        cuts.add(node)

    for node in graph.nodes:
        if node in plan and node not in cuts:
            inside = [u for u in node.users if u in plan or (u in takes and node in leads)]
            if inside and len(inside) < len(node.users):
                cut(node)
    for put in puts:  # what is put back before the end (keys of an exit's next layer) ends a branch: nothing before it is computed again
        if put in plan and any(u not in plan for u in put.users):
            for source in _taken(put, takes) & plan - cuts:
                cut(source)
    if any(n.target is ops.put_rows for n in cuts):
        return set(), set()
    return (plan, cuts) if any(n.target is not ops.put_rows for n in plan) else (set(), set())


def _taken(put: fx.Node, takes: set[fx.Node]) -> set[fx.Node]:
    """What the rows of a mark were taken from."""
    found: set[fx.Node] = set()
    waiting, seen = [put.args[0]], set[Any]()
    while waiting:
        node: Any = waiting.pop()
        if node in takes:
            found.add(node.args[0])
        elif node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return found


def _alike(node: fx.Node) -> bool:
    """Whether a node treats every token alike and is a residual addition or a norm."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 3:
        return False
    if node.target is aten.add.Tensor and not node.kwargs:
        return all(isinstance(a, fx.Node) and str(a.meta["val"].shape) == str(value.shape) for a in node.args)
    return node.target in _NORMS and (node.target is aten.rms_norm.default or node.args[0].target is not ops.put_rows)  # type: ignore[union-attr]


class _Join:
    def __init__(self, graph: Graph, gates: fx.Node, plan: set[fx.Node], cuts: set[fx.Node]) -> None:
        self.graph, self.plan, self.cuts = graph, plan, cuts
        closed = next((n for n in gates.users if n.target is aten.rsub.Scalar), None)
        if closed is None:
            with graph.inserting(before=gates.next) as b:
                closed = b.call(aten.rsub.Scalar, gates, 1)
        self.sides: tuple[fx.Node, fx.Node] = gates, closed
        self.apart: dict[fx.Node, list[fx.Node | None]] = {}  # rows of either side; None for zeros

    def run(self) -> None:
        for node in self.graph.nodes:
            if node in self.plan:
                with self.graph.inserting(before=node) as b:
                    self.apart[node] = self._rows(b, node)
                if node in self.cuts:
                    self._merge(node, *self.apart.pop(node), everywhere=True)
            elif node.target is ops.take_rows and node.args[0] in self.apart and node.args[1] in self.sides:
                rows = self.apart[node.args[0]][self.sides.index(node.args[1])]  # type: ignore[index]
                assert rows is not None, f"{node.name} takes rows that are all zero"
                node.replace_all_uses_with(rows)
                self.graph.module.graph.erase_node(node)
        for node, (opened, closed) in self.apart.items():
            if node.target is ops.put_rows or all(u in self.plan for u in node.users):
                continue
            self._merge(node, opened, closed)

    def _merge(self, node: fx.Node, opened: fx.Node | None, closed: fx.Node | None, *, everywhere: bool = False) -> None:
        with self.graph.inserting(before=node) as b:
            if opened is not None and closed is not None:
                merged = b.call(ops.merge_rows, opened, closed, *self.sides)
            else:
                side = int(opened is None)
                merged = b.call(ops.put_rows, (opened, closed)[side], self.sides[side], True)
        node.replace_all_uses_with(merged, delete_user_cb=lambda user: everywhere or user not in self.plan)

    def _rows(self, b: Builder, node: fx.Node) -> list[fx.Node | None]:
        if node.target is ops.put_rows:
            return [node.args[0] if node.args[1] is side else None for side in self.sides]  # type: ignore[misc]
        if node.target is aten.add.Tensor:
            return [self._sum(b, node, side) for side in (0, 1)]
        rows = [self._side(b, node.args[0], side) for side in (0, 1)]
        return [None if r is None else b.call(node.target, r, *node.args[1:]) for r in rows]  # type: ignore[arg-type]

    def _sum(self, b: Builder, node: fx.Node, side: int) -> fx.Node | None:
        terms = [t for t in (self._side(b, a, side) for a in node.args) if t is not None]
        return b.call(aten.add.Tensor, *terms) if len(terms) == 2 else terms[0] if terms else None

    def _side(self, b: Builder, node: Any, side: int) -> fx.Node | None:
        return self.apart[node][side] if node in self.apart else b.call(ops.take_rows, node, self.sides[side])
