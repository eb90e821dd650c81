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
    """
    for gates in dict.fromkeys(_open(n) for n in graph.nodes if n.target is ops.put_rows):
        plan = _plan(graph, gates)
        if plan:
            _Join(graph, gates, plan).run()
    graph.clean()


def _open(node: fx.Node) -> Any:
    """The gates of a mark, or what they are the complement of."""
    gates: Any = node.args[1]
    return gates.args[0] if gates.target is aten.rsub.Scalar else gates


def _plan(graph: Graph, gates: fx.Node) -> set[fx.Node]:
    """The marks, additions and norms whose tokens are kept apart; none where their values are needed together before the end."""
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
    for node in plan:
        inside = [u for u in node.users if u in plan or (u in takes and node in leads)]
        if inside and len(inside) < len(node.users):
            return set()
    return plan if any(n.target is not ops.put_rows for n in plan) else set()


def _alike(node: fx.Node) -> bool:
    """Whether a node treats every token alike and is a residual addition or a norm."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 3:
        return False
    if node.target is aten.add.Tensor and not node.kwargs:
        return all(isinstance(a, fx.Node) and str(a.meta["val"].shape) == str(value.shape) for a in node.args)
    return node.target in _NORMS and (node.target is aten.rms_norm.default or node.args[0].target is not ops.put_rows)  # type: ignore[union-attr]


class _Join:
    def __init__(self, graph: Graph, gates: fx.Node, plan: set[fx.Node]) -> None:
        self.graph, self.plan = graph, plan
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
            elif node.target is ops.take_rows and node.args[0] in self.apart and node.args[1] in self.sides:
                rows = self.apart[node.args[0]][self.sides.index(node.args[1])]  # type: ignore[index]
                assert rows is not None, f"{node.name} takes rows that are all zero"
                node.replace_all_uses_with(rows)
                self.graph.module.graph.erase_node(node)
        for node, (opened, closed) in self.apart.items():
            if node.target is ops.put_rows or all(u in self.plan for u in node.users):
                continue
            with self.graph.inserting(before=node) as b:
                if opened is not None and closed is not None:
                    merged = b.call(ops.merge_rows, opened, closed, *self.sides)
                else:
                    side = int(opened is None)
                    merged = b.call(ops.put_rows, (opened, closed)[side], self.sides[side], True)
            node.replace_all_uses_with(merged, delete_user_cb=lambda user: user not in self.plan)

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
