"""Tuning of TVM's kernels: what is taken, what is kept, and that nothing but the speed changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import assert_close, own_cache
from torch import Tensor

from dyncomp.bundle import Manifest, Source, open_bundle, save_bundle_files, seal
from dyncomp.cli import cli
from dyncomp.errors import ModelError
from dyncomp.ops import routed_ffn, threshold_gates
from dyncomp.regions.tokens import random_inputs
from dyncomp.trace import trace

pytest.importorskip("tvm")

from dyncomp.backends.artifact import CONFIG
from dyncomp.backends.tvm import tune as tuning
from dyncomp.backends.tvm.kernels.tile import Tile
from dyncomp.backends.tvm.lower import lower
from dyncomp.backends.tvm.machine import this_machine
from dyncomp.backends.tvm.run import TvmModel
from dyncomp.backends.tvm.shapes import FFNShape, LinearShape, Shape
from dyncomp.backends.tvm.tune import Stopwatch, Task, Timing, candidates, spread, tune
from dyncomp.backends.tvm.tuned import Database, Entry, tiles_for

HERE = dataclasses.replace(this_machine(), threads=1)
TILE = Tile(HERE.lanes, HERE.vectors, HERE.rows)
SMALL = Task(LinearShape(40, 36), (1, 9))


class Played:
    """Timings from a list, in place of a clock: the ratios of each look at a candidate, for every number of tokens."""

    def __init__(self, *looks: float | dict[int, float], noise: float = 0.05) -> None:
        self.looks, self.noise = list(looks), noise
        self.asked: list[tuple[Tile, int]] = []

    def __call__(self, shape: Shape, default: Tile, candidate: Tile, tokens: Sequence[int], rounds: int) -> Timing:
        self.asked.append((candidate, rounds))
        look = self.looks.pop(0)
        return Timing(look if isinstance(look, dict) else dict.fromkeys(tokens, look), dict.fromkeys(tokens, self.noise))


def play(database: Database, *looks: float | dict[int, float], task: Task = SMALL, limit: int = 1) -> tuple[Entry, Played]:
    played = Played(*looks)
    (entry,) = tune([task], HERE, database, measure=played, seconds=60, limit=limit)
    assert not played.looks, "every look was asked for"
    return entry, played


# ---- what is taken -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("looks", "taken"),
    [
        ([0.8], False),
        ([1.04], False),  # within the noise
        ([1.5, 1.04], False),  # won once
        ([{1: 2.0, 9: 0.9}], False),  # gains on one token what it loses on nine
        ([1.5, 1.2], True),
        ([{1: 1.3, 9: 0.97}, {1: 1.3, 9: 0.97}], True),  # a loss within the noise is none
    ],
)
def test_only_what_wins_twice_by_more_than_the_noise_is_taken(looks: list[Any], taken: bool, tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    entry, played = play(database, *looks)
    assert [rounds for _, rounds in played.asked] == [tuning.ROUNDS, 2 * tuning.ROUNDS][: len(looks)]
    assert (entry.chosen is not None) == taken
    assert tiles_for(HERE, database).of(SMALL.shape) == (played.asked[0][0] if taken else TILE)
    assert tiles_for(dataclasses.replace(HERE, threads=2), database).of(SMALL.shape) == TILE, "another number of threads"
    assert bool(database.digest(HERE)) == taken


def test_the_best_is_kept_and_an_interrupted_search_goes_on(tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    offered = candidates(SMALL.shape, TILE, HERE, 1)
    play(database, 1.3, 1.3, 1.2, limit=2)
    assert tiles_for(HERE, database).of(SMALL.shape) == offered[0], "the second beats the default only: it is not looked at again"
    entry, played = play(database, 1.4, 1.4, 0.9, limit=4)
    assert [tile for tile, _ in played.asked] == [offered[2], offered[2], offered[3]], "the first two are not tried again"
    assert tiles_for(HERE, database).of(SMALL.shape) == offered[2]
    assert len(entry.trials) == 4
    assert play(database, limit=4)[0] == entry
    (out_of_time,) = tune([SMALL], HERE, database, measure=Played(), seconds=0)
    assert out_of_time == entry
    assert not tune([SMALL], HERE, database, measure=Played(), seconds=0, again=True)[0].trials


def test_candidates_come_in_an_order_that_the_seed_sets() -> None:
    shape = FFNShape(4, 300, 64, 64, "silu", True)
    for shape_, threads in ((SMALL.shape, 1), (LinearShape(576, 1536), 2), (shape, 2)):
        offered = candidates(shape_, TILE, HERE, threads, seed=3)
        assert offered == candidates(shape_, TILE, HERE, threads, seed=3)
        assert len(set(offered)) == len(offered)
        assert TILE not in offered
        assert all(shape_.allows(t) for t in offered)
    assert offered != candidates(shape, TILE, HERE, 2, seed=4)
    assert {t.split for t in candidates(LinearShape(576, 1536), TILE, HERE, 2)} == {1, 2, 4}


def test_spread_holds_the_median() -> None:
    assert spread([1.0] * 15) == 0
    assert spread([2.0] + [1.0] * 14) == 0, "one round that was disturbed"
    assert spread([0.9, 1.1] * 8) == pytest.approx(1 / 0.9 - 1)


# ---- measuring -----------------------------------------------------------------------------------------------------
def test_candidates_are_built_checked_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "ROUNDS", 3)
    monkeypatch.setattr(tuning, "SAMPLE", 1e-5)
    monkeypatch.setattr(tuning, "COLD", 1 << 16)
    database, watch = Database(tmp_path / "tuning.json"), Stopwatch(HERE)
    (entry,) = tune([SMALL], HERE, database, measure=watch, seconds=600, limit=2)
    assert [t.failed for t in entry.trials] == ["", ""]
    assert all(set(t.ratio) == set(t.noise) == {"1", "9"} and min(t.ratio.values()) > 0 for t in entry.trials)
    assert database.entries()[entry.key] == entry
    every = Tile(HERE.lanes, 2, 3, unroll=2, parts=2, split=2)
    watch(SMALL.shape, TILE, every, (9,), 1)
    watch(FFNShape(3, 40, 33, 52, "relu", False), TILE, dataclasses.replace(every, split=1), (9,), 1)

    def wrong(self: LinearShape, inputs: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
        return torch.nn.functional.linear(*inputs, *weights) + 1

    monkeypatch.setattr(LinearShape, "reference", wrong)
    (entry,) = tune([SMALL], HERE, database, measure=watch, seconds=600, limit=3)
    assert "wrong for 1 tokens" in entry.trials[2].failed
    assert not entry.trials[2].taken


# ---- the database --------------------------------------------------------------------------------------------------
def test_a_damaged_database_is_refused_by_name(tmp_path: Path) -> None:
    database = Database(tmp_path / "tuning.json")
    assert tiles_for(HERE, database).tuned == {}
    play(database, 1.5, 1.5, task=Task(FFNShape(2, 64, 24, 24, "relu", True), (1,)))
    good = json.loads(database.path.read_text())

    def changed(**change: Any) -> str:
        return json.dumps({**good, "entries": [good["entries"][0] | change]})

    trial = good["entries"][0]["trials"][0]
    odd = trial["parameters"] | {"vectors": 3}
    for text, named in [
        ("{", "damaged"),
        ('{"schema_version": 1}', "damaged"),
        ('{"schema_version": 9, "entries": []}', "schema 9"),
        (changed(best=1), "damaged"),
        (changed(trials=[trial | {"taken": False}]), "damaged"),
        (changed(trials=[trial | {"parameters": odd | {"rows": 0}}]), "damaged"),
        (changed(trials=[trial | {"parameters": odd}]), "cannot have"),
        (changed(kernel="conv"), "cannot have"),
    ]:
        database.path.write_text(text)
        with pytest.raises(ModelError, match=f"tuning.json.* {named}"):
            tiles_for(HERE, database)
    database.path.write_text("{")
    with pytest.raises(ModelError, match=r"tuning\.json"):
        lower(trace(torch.nn.Linear(4, 4), {"input": torch.zeros(2, 4)}, {}), tmp_path / "out", tuning=database)
    database.path.write_text(changed(sources="of another release"))
    assert tiles_for(HERE, database).tuned == {}


# ---- models --------------------------------------------------------------------------------------------------------
class Small(torch.nn.Module):
    """A routed FFN of four experts and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = torch.nn.Linear(24, 4), torch.nn.Linear(24, 80)
        self.up, self.down = (torch.nn.Parameter(torch.randn(s) / 4) for s in ((4, 64, 24), (4, 24, 32)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + routed_ffn(x, threshold_gates(self.router(x)), self.up, None, self.down, "silu"))


def test_a_bundle_is_made_again_with_what_won_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    graph = trace(Small(), {"x": torch.randn(2, 5, 24)}, {"x": {0: "batch", 1: "sequence"}})
    folder, out = tmp_path / "part", tmp_path / "out"
    folder.mkdir()
    save_bundle_files(folder, graph, {"model": "small", "bench": []})
    lower(graph, folder / "artifacts" / "tvm", machine=HERE)
    source = Source(name="small", kind="test", task="encoder", fingerprint="0", context_length=None, output_name="y", config={})
    seal(folder, out, Manifest(source=source, recipe="none", passes=[], refusals=[], versions={}))
    inputs = random_inputs(graph, {"batch": 2, "sequence": 7})
    shutil.copytree(out / "artifacts" / "tvm", tmp_path / "before")  # a library that is loaded is not loaded again from the same path
    (before,) = TvmModel(tmp_path / "before", threads=1).run(**inputs).values()

    def tuned() -> dict[str, Any]:
        result = CliRunner().invoke(cli, ["tune", str(out), "--minutes", "0", "--threads", "1", "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    report = tuned()
    assert report["artifact"] == "as it was"
    assert {(r["kernel"], r["calls"], *r["tokens"]) for r in report["kernels"]} == {("linear", 1, 128), ("routed_ffn", 1, 128)}
    assert [r["parameters"] for r in report["kernels"]] == [None] * 3
    database = Database()
    for shape in (LinearShape(80, 24), FFNShape(4, 32, 24, 24, "silu", True)):
        narrow = next(i for i, t in enumerate(candidates(shape, TILE, HERE, 1)) if t.vectors == 2)
        looks = [0.5] * narrow + [1.5] * 2
        play(database, *looks, task=Task(shape, (128,)), limit=narrow + 1)
    held = (out / "weights.safetensors").stat().st_ino
    report = tuned()
    assert report["artifact"] == "made again"
    assert report["parity"]["relative_error"] <= 1e-5
    assert sum(r["parameters"] is not None and r["parameters"]["vectors"] == 2 for r in report["kernels"]) == 2
    opened = open_bundle(out)  # every checksum
    assert (out / "weights.safetensors").stat().st_ino == held
    assert opened.report()["tuning"]["bench_before"] == []
    assert not list(tmp_path.glob("*.part"))
    config = json.loads((opened.artifact("tvm") / CONFIG).read_text())
    assert {t["kernel"] for t in config["tuned"]} == {"linear", "routed_ffn"}
    assert any(p["shape"][-1] == 2 * HERE.lanes for p in config["parameters"])
    (after,) = TvmModel(out / "artifacts" / "tvm", threads=1).run(**inputs).values()
    assert_close(torch.from_numpy(after), torch.from_numpy(before), rel=1e-5)
    assert tuned()["artifact"] == "as it was"
    database.path.write_text("{")
    result = CliRunner().invoke(cli, ["tune", str(out)])
    assert isinstance(result.exception, ModelError)
