"""Walking the dataflow of a graph."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx


def ancestors(node: fx.Node, depth: int) -> Mapping[fx.Node, int]:
    """Nodes that ``node`` is computed from, nearest first, up to a number of steps back."""
    found: dict[fx.Node, int] = {}
    level = [node]
    for step in range(1, depth + 1):
        level = [n for m in level for n in m.all_input_nodes if n not in found]
        for n in level:
            found.setdefault(n, step)
        level = list(dict.fromkeys(level))
    return found


def descendants(node: fx.Node, depth: int) -> Mapping[fx.Node, int]:
    """Nodes that are computed from ``node``, nearest first, up to a number of steps on."""
    found: dict[fx.Node, int] = {}
    level = [node]
    for step in range(1, depth + 1):
        level = [n for m in level for n in m.users if n not in found]
        for n in level:
            found.setdefault(n, step)
    return found


def between(result: fx.Node, source: fx.Node) -> set[fx.Node]:
    """The nodes on some way from ``source`` to ``result``, without ``source``."""
    reached = {source}
    region: set[fx.Node] = set()
    stack = [source]
    after: set[fx.Node] = set()
    while stack:
        for user in stack.pop().users:
            if user not in after:
                after.add(user)
                stack.append(user)
    stack = [result]
    while stack:
        node = stack.pop()
        if node in region or node in reached or node not in after:
            continue
        region.add(node)
        stack.extend(node.all_input_nodes)
    return region
