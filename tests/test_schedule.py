"""Placing regions, on tables whose best answer is known; and what this machine is measured to do."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench.tiny import trace_tiny
from dyncomp import deploy, hardware
from dyncomp.cli import cli
from dyncomp.errors import RequestError
from dyncomp.hardware import Probe
from dyncomp.schedule import Choice, Estimate, Work, choose_threads, place, roofline

CPU, GPU = Choice("cpu", "fp32"), Choice("cuda", "fp32")


def bus(size: float, made: Choice, read: Choice) -> float:
    """A second for each byte that changes devices."""
    return 0.0 if made.device == read.device else size


def by_trying(graph: nx.DiGraph, costs: dict[Any, dict[Choice, Estimate]], memory: float) -> float:
    best = math.inf
    for choices in itertools.product(*(costs[n] for n in graph)):
        chosen = dict(zip(graph, choices, strict=True))
        if sum(costs[n][c].bytes for n, c in chosen.items()) <= memory:
            seconds = sum(costs[n][c].seconds for n, c in chosen.items())
            best = min(best, seconds + sum(bus(d["bytes"], chosen[a], chosen[b]) for a, b, d in graph.edges(data=True)))
    return best


@pytest.mark.parametrize("seed", range(20))
def test_nothing_that_could_be_tried_is_faster(seed: int) -> None:
    random = np.random.default_rng(seed)
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(range(6))
    graph.add_edges_from((a, b, {"bytes": float(random.random())}) for a, b in itertools.combinations(range(6), 2) if random.random() < 0.5)
    choices = [CPU, Choice("cpu", "int8"), GPU]
    costs = {n: {c: Estimate(float(random.random()), float(random.integers(1, 5))) for c in choices} for n in graph}
    for memory in (10.0, 14.0, math.inf):
        expected = by_trying(graph, costs, memory)
        if math.isinf(expected):
            with pytest.raises(RequestError, match="nothing fits"):
                place(graph, costs, bus, memory=memory)
            continue
        found = place(graph, costs, bus, memory=memory)
        assert found.seconds == pytest.approx(expected)
        assert found.bytes == sum(costs[n][c].bytes for n, c in found.choices.items()) <= memory
        moved = sum(bus(d["bytes"], found.choices[a], found.choices[b]) for a, b, d in graph.edges(data=True))
        assert found.seconds == pytest.approx(sum(costs[n][c].seconds for n, c in found.choices.items()) + moved)


def test_a_faster_device_is_worth_its_transfers_or_not() -> None:
    graph: nx.DiGraph = nx.DiGraph()
    nx.add_path(graph, "abc", bytes=1.0)
    costs = {n: {CPU: Estimate(2.0), GPU: Estimate(0.5)} for n in "b"} | {n: {CPU: Estimate(2.0)} for n in "ac"}
    assert set(place(graph, costs, bus).choices.values()) == {CPU}  # 1.5 s won, 2 s lost
    costs["b"][CPU] = Estimate(3.0)
    assert place(graph, costs, bus).choices["b"] == GPU


def test_precision_goes_down_where_that_costs_least() -> None:
    """Eight bytes too many: of two regions that could be smaller, the one that gets no slower."""
    graph: nx.DiGraph = nx.DiGraph()
    nx.add_path(graph, ["ffn", "head"])
    small = Choice("cpu", "int4")
    costs = {"ffn": {CPU: Estimate(1.0, 16.0), small: Estimate(1.0, 8.0)}, "head": {CPU: Estimate(1.0, 16.0), small: Estimate(3.0, 8.0)}}
    found = place(graph, costs, bus, memory=24.0)
    assert (found.choices, found.seconds, found.bytes) == ({"ffn": small, "head": CPU}, 2.0, 24.0)
    with pytest.raises(RequestError, match="in a circle"):
        place(nx.DiGraph([("a", "b"), ("b", "a")]), {}, bus)


# ---- threads -------------------------------------------------------------------------------------------------------
READS, MULTIPLIES = Work("reads", 1e9, 1.0), Work("multiplies", 1.0, 1e12)


def test_a_roofline_is_the_larger_of_reading_and_computing() -> None:
    probe = Probe({1: 1e10}, {1: 1e11})
    assert roofline(READS, 1, probe) == pytest.approx(0.1)
    assert roofline(MULTIPLIES, 1, probe) == pytest.approx(10.0)


def test_threads_are_those_of_the_fastest_session() -> None:
    scales = Probe({1: 1e10, 2: 1.9e10}, {1: 1e11, 2: 1.9e11})
    hinders = Probe({1: 1e10, 2: 0.5e10}, {1: 1e11, 2: 1.9e11})  # another process holds the second core
    alike = Probe({1: 1e10, 2: 0.95e10}, {1: 1e11, 2: 1e11})
    assert choose_threads([READS], scales) == 2
    assert choose_threads([READS], hinders) == 1
    assert choose_threads([READS, MULTIPLIES], hinders) == 2  # what multiplies takes longer
    assert choose_threads([READS], alike) == 2  # too little to give a core up for
    assert choose_threads([], hinders) == 2


def test_measured_rows_count_where_every_number_of_threads_has_one() -> None:
    scales = Probe({1: 1e10, 2: 1.9e10}, {1: 1e11, 2: 1.9e11})
    work = [Work("ffn", 1e9, 1.0, "ffn 8x32x8; dense")]
    measured = {1: {"ffn 8x32x8; dense": 0.02}, 2: {"ffn 8x32x8; dense": 0.08}}
    assert choose_threads(work, scales, measured) == 1
    assert choose_threads(work, scales, {2: measured[2]}) == 2
    assert choose_threads([Work("ffn", 1e9, 1.0, "another")], scales, measured) == 2


def test_a_session_takes_the_threads_of_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace_tiny("llama")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    deploy.lower_artifact(graph, tmp_path)
    work = [Work(**part) for part in json.loads((tmp_path / deploy.WORK).read_bytes())]
    weights = sum(p.numel() for p in {id(t): t for t in graph.constants().values() if isinstance(t, torch.nn.Parameter)}.values())
    assert sum(w.bytes for w in work) == pytest.approx(4 * weights, rel=0.05)
    assert sum(w.row is not None for w in work) == 2
    seen: list[Probe] = []

    def measured(bandwidth: dict[int, float]) -> Any:
        seen.append(Probe(bandwidth, dict.fromkeys(bandwidth, 1e12)))
        return seen[-1]

    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(deploy, "latency_table", lambda n: type("Table", (), {"file": tmp_path / "none"}))
    monkeypatch.setattr(deploy, "thread_counts", lambda: [1, 2, 4])
    monkeypatch.setattr(deploy, "probe", lambda: measured({1: 1e10, 2: 3e10, 4: 1e10}))
    assert deploy.session_threads(tmp_path) == 2
    monkeypatch.setattr(deploy, "probe", lambda: Probe({1: 1.0, 2: 3e10, 4: 1.0}, {1: 1.0, 2: 1.0, 4: 1.0}, disturbed=True))
    assert deploy.session_threads(tmp_path) == 4
    monkeypatch.setattr(deploy, "thread_counts", lambda: [1])
    assert deploy.session_threads(tmp_path) == 1
    (tmp_path / deploy.WORK).unlink()
    monkeypatch.setattr(deploy, "thread_counts", lambda: [1, 3])
    assert deploy.session_threads(tmp_path) == 3
    assert len(seen) == 1


# ---- the probe -----------------------------------------------------------------------------------------------------
def test_this_machine_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_SIDE", 64)
    before = torch.get_num_threads()
    monkeypatch.setattr(hardware, "_OWN", 0.0)  # whatever else this machine does
    found = hardware.probe()
    assert list(found.bandwidth) == list(found.peak) == hardware.thread_counts()
    assert all(0 < value < float("inf") for value in (*found.bandwidth.values(), *found.peak.values()))
    assert torch.get_num_threads() == before
    shown = json.loads(CliRunner().invoke(cli, ["hardware", "--json"]).output)
    assert shown["bandwidth"] == {str(n): value for n, value in found.bandwidth.items()}
    assert "cpu" in shown["devices"]
    assert "GB/s" in CliRunner().invoke(cli, ["hardware"]).output
    monkeypatch.setattr(hardware, "_measure", lambda counts: pytest.fail("measured again"))
    assert hardware.probe() == found
    (file,) = (tmp_path / "hardware").iterdir()
    file.write_text("{")
    with pytest.raises(BaseException, match="measured again"):
        hardware.probe()


def test_what_others_disturbed_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", str(tmp_path))
    monkeypatch.setattr(hardware, "_best", lambda call: (0.5, 0.3))  # a third of a core
    found = hardware.probe()
    assert found.disturbed
    assert set(found.peak.values()) == {2 * hardware._SIDE**3 / 0.5}
    assert set(found.bandwidth.values()) == {4 * max(1 << 23, hardware.cache_bytes() // 2) / 0.5}
    assert not (tmp_path / "hardware").exists()
    assert "too low" in CliRunner().invoke(cli, ["hardware"]).output
    monkeypatch.setattr(hardware, "_best", lambda call: (1.0, float(hardware.default_threads())))
    assert not hardware.probe().disturbed
    assert (tmp_path / "hardware").exists()


def test_threads_that_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
        monkeypatch.setattr(hardware, "default_threads", lambda cores=cores: cores)
        assert hardware.thread_counts() == counts
