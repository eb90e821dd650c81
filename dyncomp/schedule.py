"""Where the regions of a graph run: on which device, in which precision, with how many threads.

The best placement of a graph whose costs are known is found exactly: regions are taken in topological order, and of all choices for those
whose results are still awaited the fastest are kept, and slower ones only where they take less memory. That is cheap where few results
are awaited at a time, as in a transformer, which is nearly a chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from dyncomp.errors import RequestError
from dyncomp.hardware import Probe

WORTH = 0.9
"""Fewer threads than there are cores are taken when they need at most this share of the time."""


@dataclass(frozen=True)
class Choice:
    """Where and how a region runs. device: ``cpu``, ``cuda`` …; precision: of its weights."""

    device: str = "cpu"
    precision: str = "fp32"
    threads: int = 1


@dataclass(frozen=True)
class Estimate:
    """What a region costs by some choice: seconds of a step, and bytes that stay in memory."""

    seconds: float
    bytes: float = 0.0


@dataclass(frozen=True)
class Placement:
    """Seconds of a step in all, bytes in all, and the choice for each region."""

    seconds: float
    bytes: float
    choices: dict[Any, Choice]


Transfer = Callable[[float, Choice, Choice], float]
"""(bytes of a result, where it is made, where it is read) -> seconds; infinite where that cannot be."""


def place(graph: nx.DiGraph, costs: Mapping[Any, Mapping[Choice, Estimate]], transfer: Transfer, *, memory: float = math.inf) -> Placement:
    """The placement of least total time within a memory limit.

    Args:
        graph: regions, an edge from each to those that read its result; ``bytes`` of an edge is the size of that result.
        costs: what each region may be, and costs.
        memory: bytes of all regions together, at most.

    Raises:
        RequestError: the graph has a cycle, or nothing fits into the memory.
    """
    if not nx.is_directed_acyclic_graph(graph):
        raise RequestError("the regions to place depend on each other in a circle")
    order = list(nx.topological_sort(graph))
    left = {node: graph.out_degree(node) for node in order}  # readers that are not placed yet
    # (choices of regions whose result is awaited) -> ways to get there, the fastest first and each smaller than those before
    states: dict[tuple[tuple[Any, Choice], ...], list[tuple[float, float, tuple[Any, ...]]]] = {(): [(0.0, 0.0, ())]}
    for node in order:
        for source in graph.predecessors(node):
            left[source] -= 1
        reached: dict[tuple[tuple[Any, Choice], ...], list[tuple[float, float, tuple[Any, ...]]]] = {}
        for awaited, ways in states.items():
            made = dict(awaited)
            for choice, cost in costs[node].items():
                moved = sum(transfer(graph.edges[s, node].get("bytes", 0.0), made[s], choice) for s in graph.predecessors(node))
                if math.isinf(moved):
                    continue
                key = tuple((n, c) for n, c in (*awaited, (node, choice)) if left[n])
                reached.setdefault(key, []).extend(
                    (seconds + cost.seconds + moved, size + cost.bytes, (choice, path))
                    for seconds, size, path in ways
                    if size + cost.bytes <= memory
                )
        states = {key: _undominated(ways) for key, ways in reached.items() if ways}
    best = min((ways[0] for ways in states.values()), default=None, key=lambda way: way[0])
    if best is None:
        raise RequestError(f"nothing fits into {memory / 1e6:.3g} MB", hint="allow more memory, or smaller precisions")
    seconds, size, path = best
    choices = []
    while path:
        choice, path = path
        choices.append(choice)
    return Placement(seconds, size, dict(zip(order, reversed(choices), strict=True)))


def _undominated(ways: list[tuple[float, float, tuple[Any, ...]]]) -> list[tuple[float, float, tuple[Any, ...]]]:
    kept: list[tuple[float, float, tuple[Any, ...]]] = []
    for way in sorted(ways, key=lambda w: w[:2]):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


@dataclass(frozen=True)
class Work:
    """What a step of decoding asks of a region.

    Args:
        bytes: of weights that it reads. flops: two a multiply-accumulate.
        row: its name in the table of latencies, where it can be there.
    """

    name: str
    bytes: float
    flops: float
    row: str | None = None


def roofline(work: Work, threads: int, probe: Probe) -> float:
    """Seconds at least: for what is read, or what is computed (Williams, Waterman & Patterson 2009)."""
    return max(work.bytes / probe.bandwidth[threads], work.flops / probe.peak[threads])


def choose_threads(work: Sequence[Work], probe: Probe, rows: Mapping[int, Mapping[str, float]] | None = None) -> int:
    """Threads for a session that runs these regions one after the other; every region has the same, for a session has one pool.

    Args:
        rows: threads -> seconds by :attr:`Work.row`, as measured. A region's count where there is one for each number of threads: a
            roofline is a bound, and no match for a time.
    """
    counts, rows = sorted(probe.bandwidth), rows or {}

    def seconds(part: Work, threads: int) -> float:
        measured = [rows.get(n, {}).get(part.row or "") for n in counts]
        known = measured[counts.index(threads)] if None not in measured else None
        return roofline(part, threads, probe) if known is None else known

    graph: nx.DiGraph = nx.DiGraph()
    nx.add_path(graph, range(len(work)))
    graph.add_nodes_from(range(len(work)))
    costs = {i: {Choice(threads=n): Estimate(seconds(part, n)) for n in counts} for i, part in enumerate(work)}
    best = place(graph, costs, lambda _, made, read: 0.0 if made == read else math.inf)
    most = Choice(threads=counts[-1])
    chosen = next(iter(best.choices.values()), most)
    return chosen.threads if best.seconds <= WORTH * sum(c[most].seconds for c in costs.values()) else most.threads
