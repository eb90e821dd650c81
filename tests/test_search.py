"""The search: goals, the order of candidates, what is kept and what is continued."""

from __future__ import annotations

import json
import math
import os
import xml.etree.ElementTree

import click
import pytest
import torch
from click.testing import CliRunner
from dyncomp.backends.native import available
from dyncomp.passes import Quantize
from helpers import own_cache
from tiny_checkpoint import write_checkpoint, write_text

from dyncomp import bundle, search
from dyncomp.cli import cli
from dyncomp.cli.options import Size
from dyncomp.convert import ConvertRequest, _rewrite
from dyncomp.deploy import lower_artifact
from dyncomp.errors import RequestError, SearchError
from dyncomp.latency import LatencyTable, Layer, layers_of
from dyncomp.models import load_model
from dyncomp.pipeline import Context, Pipeline, no_progress
from dyncomp.report.frontier import frontier, report_html
from dyncomp.report.inspection import bundle_tables
from dyncomp.report.tables import search_table
from dyncomp.search import Goal, Trial
from dyncomp.trace import trace_model

TEXT = ["--tokens", "4096", "--windows", "2", "--calibrate", "text.txt"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_checkpoint(folder / "model")
    write_text(folder / "text.txt")
    patch = pytest.MonkeyPatch()
    patch.setenv("DYNCOMP_CACHE", own_cache(folder / "cache"))
    patch.setattr(search, "release_memory", lambda: None)  # a tiny model has none to give back, and collecting garbage takes a second
    yield folder
    patch.undo()


def convert(folder, out: str, *arguments: str) -> dict:
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(cli, ["convert", "model", "-o", out, *TEXT, *arguments, "--json"])
    finally:
        os.chdir(before)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize("backend", ["ort", "tvm"])
def test_the_fastest_within_the_limit_is_taken(backend, place, monkeypatch) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
        if not available():
            pytest.skip("no C++ compiler here")
    speeds = {"int4, rounded": 3.0, "int4, head too": 3.5}
    timed = []

    def measure(self: search.Search, trial: Trial, graph) -> None:
        folder = self._artifact(trial.name)
        assert self.measure(graph, folder)["speed"] > 0  # of the real artifact; it is given, so that the choice is not the machine's
        timed.append(trial.name)
        trial.speed, trial.prefill, trial.bytes = speeds[trial.name], 1.0, 1

    monkeypatch.setattr(search.Search, "_time", measure)
    report = convert(place, f"fast-{backend}", "--max-loss", "50%", "--trials", "2", "--backend", backend)
    assert timed == ["int4, rounded", "int4, head too"]
    found = report["search"]
    assert found["chosen"] == "int4, head too"
    assert all(abs(t["loss"]) < 0.5 for t in found["trials"])
    assert report["passes"] == ["quantize{bits=4 symmetric=false head-bits=4}"]
    assert len(report["parity"]) == 1
    assert {e["engine"] for e in report["bench"]} == {f"dyncomp-{backend}"}
    opened = bundle.open_bundle(place / f"fast-{backend}")
    assert opened.graph().precision == "int4"
    assert (opened.artifact(backend) / "config.json").is_file()
    assert not (place / f"fast-{backend}.part").exists()


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_a_head_is_screened_where_4_bits_lose_too_much(place, monkeypatch) -> None:
    losses = iter([0.0, 0.9, 0.01])
    monkeypatch.setattr(search.Search, "_loss", lambda self, graph, allowed: next(losses))

    def measure(self: search.Search, trial: Trial, graph) -> None:
        self.measure(graph, self._artifact(trial.name))
        trial.speed, trial.prefill, trial.bytes = 3.0 + len(self.trials), 1.0, 1

    monkeypatch.setattr(search.Search, "_time", measure)
    report = convert(place, "screened", "--max-loss", "5%", "--trials", "3")
    assert [t["name"] for t in report["search"]["trials"]] == ["int4, rounded", "int4, head too", "int4, rounded, screened head"]
    assert report["search"]["chosen"] == "int4, rounded, screened head"
    assert report["passes"] == ["quantize{bits=4 symmetric=false screen=12.0}"]
    opened = bundle.open_bundle(place / "screened")
    assert list(opened.graph().info["screened"].values()) == [12.0]
    assert any("within 12 nats of the largest" in item for item in bundle_tables(opened) if isinstance(item, str))
    assert report["parity"][0]["relative_error"] < 0.1


def test_an_interrupted_search_continues_with_the_next_candidate(place, monkeypatch) -> None:
    tried = []
    original = search.Search._try

    def note(self: search.Search, name: str, passes):
        tried.append(name)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return original(self, name, passes)

    monkeypatch.setattr(search.Search, "_try", note)
    monkeypatch.setattr(search.Search, "_time", lambda self, trial, graph: vars(trial).update(speed=1.0, prefill=1.0, bytes=1))
    monkeypatch.chdir(place)
    goal = Goal(max_loss=0.5, trials=2)
    request = ConvertRequest(model="model", out=place / "again", goal=goal, calibrate="text.txt", tokens=4096, windows=2)
    with pytest.raises(KeyboardInterrupt):
        _rewrite(request, no_progress, str)
    done = _rewrite(request, no_progress, str)
    assert tried == ["int4, rounded", "int4, head too", "int4, head too"]
    trials = done.report["search"]["trials"]
    assert [t["name"] for t in trials] == ["int4, rounded", "int4, head too"]
    assert done.report["search"]["chosen"] == "int4, rounded"  # equally fast: the first
    assert done.report["passes"] == trials[0]["passes"]
    assert done.models["converted"].precision == "int4"


def test_nothing_within_the_limit_is_an_error_that_names_the_closest(place, monkeypatch) -> None:
    losses = iter([0.5, 0.25, 0.75])
    monkeypatch.setattr(search.Search, "_loss", lambda self, graph, allowed: next(losses))
    with pytest.raises(SearchError, match=r"no candidate reaches at most \+10.00% loss; closest: int4: \+25.00% loss"):
        convert(place, "none", "--max-loss", "10%", "--trials", "3")
    assert not (place / "none").exists()


def test_precisions_are_mixed_where_only_int8_is_good_enough(place, monkeypatch) -> None:
    losses = iter([0.5, 0.5, 0.0, 0.04])
    monkeypatch.setattr(search.Search, "_loss", lambda self, graph, allowed: next(losses))
    monkeypatch.setattr(
        search.Search, "_time", lambda self, trial, graph: vars(trial).update(speed=1.0 + len(self.trials), prefill=1.0, bytes=1)
    )
    monkeypatch.chdir(place)
    goal = Goal(max_loss=0.05, trials=4)
    request = ConvertRequest(model="model", out=place / "mixed", goal=goal, calibrate="text.txt", tokens=2048, windows=2)
    done = _rewrite(request, no_progress, str)
    assert [t["name"] for t in done.report["search"]["trials"]] == ["int4, rounded", "int4", "int8", "mixed"]
    assert done.report["search"]["chosen"] == "mixed"
    assert done.models["converted"].precision == "mixed"
    assert [t["passes"][0] for t in done.report["search"]["trials"]][1::2] == ["awq{symmetric=false}"] * 2
    assert done.report["precisions"]["loss"] <= search.MIXED * math.log1p(0.05)


def test_routing_is_tried_on_top_of_the_best_precision(place, monkeypatch) -> None:
    def measure(self: search.Search, trial: Trial, graph) -> None:
        trial.speed, trial.prefill, trial.bytes = 1.0 + len(self.trials), 1.0, 1
        self._artifact(trial.name).mkdir(parents=True, exist_ok=True)

    lines = []
    monkeypatch.setattr(search.Search, "_time", measure)
    monkeypatch.setattr(search.Search, "_experts", lambda self, block: 2)
    monkeypatch.setattr(LatencyTable, "seconds", lambda self, layer, passes: (1.0, 1.0))
    monkeypatch.setattr(search, "gather_below", lambda bits: 1.0)
    monkeypatch.chdir(place)
    request = ConvertRequest(model="model", out=place / "routed", goal=Goal(max_loss=5.0), calibrate="text.txt", tokens=4096, windows=2)
    done = _rewrite(request, no_progress, lines.append)
    names = [t["name"] for t in done.report["search"]["trials"]]
    assert names == [
        "int4, rounded", "int4, head too", "75% of the inputs, int4", "65% of the inputs, int4",
        "90% of 2 experts, int4", "75% of 2 experts, int4", "90% of the neurons, static, int4", "75% of the neurons, static, int4",
    ]  # fmt: skip
    assert done.report["search"]["chosen"] == names[-1]
    passes = {t["name"]: t["passes"] for t in done.report["search"]["trials"]}
    rounded, fitted = "quantize{bits=4 symmetric=false head-bits=4}", "quantize{bits=4 symmetric=false method=gptq head-bits=4}"
    assert passes["75% of the inputs, int4"] == ["sparsify", rounded]  # the weights are those that rounding held
    assert [p.split("{")[0] for p in passes["75% of 2 experts, int4"][:3]] == ["carve-experts", "fit-router", "refit-down"]
    for name in ("75% of 2 experts, int4", "75% of the neurons, static, int4"):
        assert passes[name][-2:] == ["awq{symmetric=false}", fitted]
    assert any("static" in line for line in lines)


def test_what_the_table_of_latencies_finds_slower_is_not_fitted(place, monkeypatch) -> None:
    speeds, fitted, asked = {"65% of the inputs, int4": 5.0}, [], []
    original = search.Search._converted

    def measure(self: search.Search, trial: Trial, graph) -> None:
        trial.speed, trial.prefill, trial.bytes, trial.token_seconds = speeds.get(trial.name, 4.0), 1.0, 1, 22.0

    def look_up(self: LatencyTable, layer: Layer, passes) -> tuple[float, float]:
        asked.append(layer)
        return {"sparsify": 2.2, "sparsify{active=0.65}": 1.0}.get(passes[0].spec, 2.0), 1.0

    def note(self: search.Search, passes, calibration):
        fitted.append((passes[0].spec, calibration.tokens))
        return original(self, passes, calibration)

    monkeypatch.setattr(search.Search, "_time", measure)
    monkeypatch.setattr(search.Search, "_converted", note)
    monkeypatch.setattr(LatencyTable, "seconds", look_up)
    monkeypatch.setattr(search, "LOOKS", ((512, 9.0), (1024, 3.0), (4096, 1.0)))
    monkeypatch.setattr(search, "gather_below", lambda bits: 1.0)
    monkeypatch.chdir(place)
    goal = Goal(max_loss=5.0, trials=5)
    request = ConvertRequest(model="model", out=place / "slower", goal=goal, calibrate="text.txt", tokens=4096, windows=2)
    found = _rewrite(request, no_progress, str).report["search"]
    assert found["chosen"] == "65% of the inputs, int4"
    slow, fast = found["trials"][-2:]
    layers = layers_of(trace_model(load_model(str(place / "model"))))
    assert {a.neurons > 0 for a in asked} == {True, False}
    assert slow["loss"] is None
    assert slow["speed"] is None
    assert slow["predicted"] == pytest.approx(4.0 * 22 / (22 + 0.2 * layers.total()))
    assert fast["predicted"] == pytest.approx(4.0 * 22 / (22 - layers.total()))
    assert (fast["quick"], fast["speed"]) == (False, 5.0)
    assert not any(spec.startswith("sparsify") and "0.65" not in spec for spec, _ in fitted)
    look = "sparsify{active=0.65 budgets=uniform}"
    assert fitted[-3:] == [(look, 512), (look, 1024), ("sparsify{active=0.65}", 3072)]
    cells = [list(column.cells) for column in search_table(found, "causal-lm").columns]
    assert cells[2][-2] == f"~{slow['predicted']:.2f}"
    assert cells[-1][-2] == "slower, by the table of latencies"


@pytest.fixture(scope="module")
def sizes(place) -> dict[int, int]:
    """Bits -> bytes of the tiny model's weights."""
    found, dense = {}, trace_model(load_model(str(place / "model")))
    for bits in (4, 8):
        graph = dense.copy()
        Pipeline([Quantize(bits=bits, head_bits=bits, symmetric=False)]).run(graph, Context())
        found[bits] = graph.weight_bytes()
    return found


@pytest.mark.parametrize(("room", "names", "chosen"), [
    (lambda s: 10 * s[8], ["int4, rounded", "int8", "int4, head too"], "int8"),
    (lambda s: (s[4] + 2 * s[8]) // 3, ["int4, rounded", "mixed, as large as allowed", "int4, head too"], "mixed, as large as allowed"),
])  # fmt: skip
def test_the_best_that_fits_into_memory(room, names, chosen, place, sizes, monkeypatch) -> None:
    losses = {"int4, rounded": 0.02, "int8": 0.001, "mixed, as large as allowed": 0.01, "int4, head too": 0.03}
    monkeypatch.setattr(search.Search, "_loss", lambda self, graph, allowed: losses[names[len(self.trials)]])

    def lower(self: search.Search, trial: Trial, graph) -> None:
        lower_artifact(graph, self._artifact(trial.name))
        vars(trial).update(speed=1.0, prefill=1.0, bytes=search.artifact_bytes(self._artifact(trial.name)))

    monkeypatch.setattr(search.Search, "_time", lower)
    monkeypatch.chdir(place)
    goal = Goal(max_memory=(limit := room(sizes)))
    request = ConvertRequest(model="model", out=place / f"fits-{chosen[:4]}", goal=goal, calibrate="text.txt", tokens=4096, windows=2)
    found = _rewrite(request, no_progress, str).report["search"]
    assert [t["name"] for t in found["trials"]] == names
    assert found["chosen"] == chosen
    assert found["goal"] == f"at most {limit / 1e6:.3g} MB"
    (best,) = (t for t in found["trials"] if t["name"] == chosen)
    assert 1.05 * sizes[4] < best["bytes"] <= limit


def test_nothing_fits_into_memory(place, sizes, monkeypatch) -> None:
    """What is too large is not evaluated."""
    lines = []
    monkeypatch.setattr(search.Search, "_fast_enough", lambda self, trial, passes: vars(trial).update(predicted=9.0) or True)
    monkeypatch.setattr(search.Search, "_loss", None)
    monkeypatch.setattr(search, "describe", lambda trial: lines.append(trial.name) or "it")
    with pytest.raises(SearchError, match=r"no candidate reaches at most 0.00464 MB; closest: it"):
        convert(place, "tiny", "--max-memory", f"{sizes[4] / 4000}kB")
    assert lines[:-1] == ["int4, rounded", "int4", "int4, head too", *(f"{a}% of the neurons, static, int4" for a in (90, 75))]
    assert lines[-1] == "int4, head too"
    assert not (place / "tiny").exists()


def test_sizes_are_bytes_with_a_unit() -> None:
    size = Size()
    assert [size.convert(s, None, None) for s in ("100MB", "1.5 GB", "64MiB", "10kB", "12", 7)] == [
        10**8,
        1_500_000_000,
        1 << 26,
        10_000,
        12,
        7,
    ]
    for wrong in ("a lot", "1.2.3MB", "-1MB", "5XB", "."):
        with pytest.raises(click.BadParameter, match="is not a size such as 100MB"):
            size.convert(wrong, None, None)


def unstarted(**fields) -> search.Search:
    """A search that has what is given, and nothing else."""
    made = object.__new__(search.Search)
    vars(made).update(goal=Goal(max_loss=0.01), task="causal-lm", **fields)
    return made


@pytest.mark.parametrize(("predicted", "stays"), [(2.0, True), (3.2, True), (3.4, False)])
def test_what_stays_slow_with_less_to_compute_is_not_looked_up(predicted: float, stays: bool) -> None:
    trial = Trial("75%", [], None, 1.0, predicted=predicted)
    made = unstarted(trials=[trial], best=Trial("dense", [], 0.0, 1.0, speed=4.0))
    assert made._stays_slow("75%", 0.65 / 0.75) == stays
    trial.loss = 0.001
    assert not made._stays_slow("75%", 0.65 / 0.75)


@pytest.mark.parametrize(("rise", "windows"), [(0.5, 2), (0.015, 8)])
def test_a_hopeless_loss_is_measured_on_the_first_windows_only(rise: float, windows: int) -> None:
    seen, selection = [], torch.zeros(8, 4, dtype=torch.int64)

    def nll(graph, rows):
        seen.append(len(rows))
        return torch.full((len(rows),), 3.0 + (graph or 0.0))

    made = unstarted(selection=selection, dense=None, _nll=nll)
    assert len(made._dense_nll) == len(selection)
    seen.clear()
    assert made._loss(math.log1p(rise), allowed=0.01) == pytest.approx(rise, rel=1e-4)
    assert sum(seen) == windows
    seen.clear()
    made._loss(math.log1p(rise), allowed=None)  # all that a speed costs
    assert sum(seen) == len(selection)


def test_goals() -> None:
    good, fast = Trial("good", [], 0.001, 1.0, speed=1.5), Trial("fast", [], 0.02, 1.0, speed=3.0)
    quick = Trial("quick", [], 0.0, 1.0, quick=True)
    limit, rate = Goal(max_loss=0.01), Goal(speedup=1.2)
    assert limit.meets(good)
    assert not limit.meets(fast)
    assert not limit.meets(quick)
    assert rate.meets(fast)
    assert not rate.meets(quick)
    assert rate.better(good, fast)
    assert Goal(max_loss=0.1).better(fast, good)


@pytest.mark.parametrize(
    "goal", [Goal(max_loss=0.01, speedup=2.0), Goal(max_loss=-0.1), Goal(speedup=0.0), Goal(max_loss=0.1, minutes=0), Goal(trials=0)]
)
def test_goals_that_make_no_sense(goal: Goal) -> None:
    with pytest.raises(RequestError):
        goal.validate()


def test_too_little_text_to_keep_some_apart(place) -> None:
    with pytest.raises(RequestError, match="keeps 8 windows, pairs, images or recordings of those to calibrate on to itself"):
        convert(place, "short", "--tokens", "1024")
    assert not list(place.glob("short*"))


def test_a_recipe_and_a_search_exclude_each_other(place) -> None:
    with pytest.raises(RequestError, match="search for a recipe, and one is named"):
        convert(place, "both", "--max-loss", "1%", "--active", "75%")
    with pytest.raises(RequestError, match="nothing can be searched"):
        convert(place, "torch", "--backend", "torch")


def test_the_frontier_is_what_no_other_candidate_beats() -> None:
    def trial(name: str, loss: float | None, speed: float | None, **more: object) -> dict:
        return {"name": name, "loss": loss, "speed": speed, "quick": False} | more

    trials = [
        trial("slow", 0.001, 1.5), trial("beaten", 0.004, 1.4), trial("fast <b>", 0.02, 3.0), trial("middle", 0.01, 2.0),
        trial("as fast", 0.03, 3.0), trial("not timed", 0.0001, None), trial("a look", 0.0001, 9.0, quick=True),
    ]  # fmt: skip
    assert frontier(trials) == ["slow", "middle", "fast <b>"]
    search = {"trials": trials, "chosen": "middle", "goal": "at most 1%"}
    page = report_html("a model", ["text & tables"], search)
    picture = xml.etree.ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    names = [node.text.split(":")[0] for node in picture.iter() if node.text and ", " in node.text and ": " in node.text]
    assert sorted(names) == sorted(["slow", "beaten", "middle", "fast <b>", "as fast"])
    assert "text &amp; tables" in page
    assert "<svg" not in report_html("a model", [], {"trials": trials[:1], "chosen": "slow"})
