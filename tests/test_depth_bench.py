"""The command behind docs/depth.md: what it stores, and that the document shows it. No time is asserted."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from dyncomp.backends.caches import page_by_page
from dyncomp.backends.native import available
from dyncomp.passes import SkipDepth
from test_depth import context, gated

from bench.branches import branch_times, packing_times
from bench.depth import bytes_by_policy, computed_shares, markdown, measure, printed, resident_bytes
from bench.tiny import trace_tiny
from dyncomp.pipeline import Pipeline
from dyncomp.regions.depth import find_skips


def test_every_figure_is_stored_and_shown() -> None:
    graph = trace_tiny("llama")
    graph.info |= {"task": "causal-lm", "context_length": 512}
    row = measure(graph, batches=(1, 2), prompt=24, rounds=2)
    assert [(s["what"], s["batch"]) for s in row["steps"]] == [("prefill", 1), ("decode", 1), ("decode", 2)]
    assert all(set(s["models"]) == {"dense", "0% skipped", "25% skipped", "50% skipped"} for s in row["steps"])
    assert row["skipped"]["dense"] == row["skipped"]["0% skipped"] == 0 < row["skipped"]["25% skipped"] < row["skipped"]["50% skipped"]
    branches = 4 if available() else 6  # with our kernels those of the attentions alone
    assert row["ifs"] == {"dense": 0} | dict.fromkeys(("0% skipped", "25% skipped", "50% skipped"), branches)
    assert set(row["open_us_per_if"]) == {"1", "2"}
    assert set(row["cache_bytes"]) == set(row["skipped"])
    text = markdown({"rows": {"tiny, fp32": row}})
    assert "## tiny, fp32" in text
    assert "| prefill of 24 | 1 | 25% skipped |" in text
    assert f"`If` in the graph: {branches}." in text


def test_pages_in_memory_are_those_that_were_written() -> None:
    array = page_by_page([8, mmap.PAGESIZE], np.uint8)
    assert resident_bytes(array) == 0
    array[2], array[5, :7] = 1, 1
    assert resident_bytes(array) == 2 * mmap.PAGESIZE
    assert not array[[0, 1, 3, 4, 6, 7]].any()


def test_branches_are_measured() -> None:
    row = {"times": branch_times(), "products": packing_times(), "threads": 1}
    assert set(row["products"]) == {f"{place}, {packed}" for place in ("inside", "outside") for packed in ("packed", "not packed")}
    text = markdown({"rows": {"branches": row}})
    assert f"An `If` that is taken adds {row['times']['taken_us']:.1f} us" in text  # type: ignore[index]


def test_bytes_follow_from_measured_gates() -> None:
    graph = trace_tiny("llama")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    ctx = context("llama", graph, batches=12)
    Pipeline([SkipDepth(active=0.75, blocks="all", rank=4)]).run(graph, ctx)
    ids = torch.cat([b["input_ids"] for b in ctx.calibration.batches])  # type: ignore[union-attr]
    computed = computed_shares(graph, ids)
    first, second = (1 - computed[s.name] for s in find_skips(graph))
    assert 0.1 < first < 0.4
    sizes = bytes_by_policy(graph, computed)
    assert sizes["dense"] == sizes["compute"] == sizes["share"] == 256
    assert sizes["absent"] == 256 - 128 * (first + second) + 2 * 4
    assert computed_shares(gated("llama", "block", closed=False), ids[:2]) == dict.fromkeys(computed, 1.0)


def test_what_the_training_printed(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("dense: 8 blocks\n  step 50: 2.717\n\n1.0 CPU minutes\n")
    assert printed(tmp_path / "out")["printed"] == ["dense: 8 blocks", "1.0 CPU minutes"]
