"""The command line as a user meets it: a tiny checkpoint through every command, and every way to ask wrongly."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from dyncomp.backends.native import available
from dyncomp.backends.ort.native import library
from dyncomp.passes import FitRouter
from dyncomp.passes.routers import FAMILIES
from helpers import own_cache, relative_error
from rich.console import Console
from safetensors.torch import load_file
from test_heal import free_port
from tiny_checkpoint import write_checkpoint, write_encoder, write_text

from dyncomp import bundle, convert, workspace
from dyncomp.cache import cache_folder
from dyncomp.cli import cli, main
from dyncomp.errors import DyncompError
from dyncomp.heal import Trainer
from dyncomp.models import load_model
from dyncomp.report.inspection import experts_table
from dyncomp.report.tables import notes, router_table
from dyncomp.router_table import compare_routers

OPTIONS = ["--tokens", "4096", "--windows", "2", "--experts", "8", "--active", "75%"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Artifacts of dense models go to a folder of the test's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("DYNCOMP_CACHE", own_cache(tmp_path_factory.mktemp("cli-cache") / "cache"))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint ``model``, texts, and a bundle ``out`` made from them."""
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "model")
    write_text(folder / "text.txt")
    write_text(folder / "other.txt", words=2000, seed=3)
    report = json.loads(run(folder, "convert", "model", "-o", "out", *OPTIONS, "--calibrate", "text.txt", "--json"))
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def run(folder, *arguments: str, code: int = 0) -> str:
    """Standard output of a command that ends with ``code``."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(cli, list(arguments))
    finally:
        os.chdir(before)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout


def refused(folder, *arguments: str, code: int = 2) -> str:
    """The message of a request that is refused, as :func:`dyncomp.cli.main` prints it."""
    errors = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["dyncomp", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == code, errors.getvalue()
    return errors.getvalue()


def refused_at_the_shell(folder, *arguments: str, code: int = 2) -> str:
    """The same by a process of its own."""
    command = [sys.executable, "-c", "from dyncomp.cli import main; main()", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr


def test_convert_reports_everything_beside_the_dense_model(place) -> None:
    report = json.loads((place / "report.json").read_text())
    assert report["schema"] == 1
    assert set(report["perplexity"]) >= {"dense", "converted", "static_pruned"}
    assert set(report["quality"]) == {"held out", "other source"}
    assert 0.6 < report["active_ffn"] < 0.9
    assert report["active_parameters"] < report["dense"]["active_parameters"]
    assert report["parity"][0]["relative_error"] <= 1e-4
    assert [(e["engine"], e["variant"]) for e in report["bench"]] == [("dyncomp-ort", "dense"), ("dyncomp-ort", "converted")]
    assert json.loads((place / "out" / "report.json").read_text())["perplexity"] == report["perplexity"]
    assert not (place / "out.part").exists()


def test_copies_are_reported_without_a_static_baseline(place) -> None:
    options = [*OPTIONS[:4], "--recipe", "switch", "--calibrate", "text.txt", "--backend", "torch", "--json"]
    report = json.loads(run(place, "convert", "model", "-o", "switch", *options))
    assert report["active_ffn"] == pytest.approx(1 / 8)
    assert report["parameters"] > 1.5 * report["dense"]["parameters"]
    assert "static_pruned" not in report["perplexity"]
    assert abs(report["perplexity"]["converted"] / report["perplexity"]["dense"] - 1) < 0.05, "copies with little noise"
    assert set(report["quality"]["held out"]["load"]) >= {"spread", "collapsed"}
    assert "spread" in run(place, "inspect", "switch", "--experts")


def test_heal_writes_a_new_bundle_beside_what_it_was_and_static_pruning_healed_alike(place, monkeypatch) -> None:
    routed: list[bool] = []
    train = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: routed.append(bool(self._routers)) or train(self))
    options = ["--tokens", "4096", "--windows", "2", "--calibrate", "text.txt", "--steps", "6", "--option", "lr=2e-5"]
    options += ["--option", "together=2"]
    report = json.loads(run(place, "heal", "out", "-o", "healed", *options, "--json"))
    before = json.loads((place / "report.json").read_text())
    assert report["passes"] == [*before["passes"], "heal{together=2 steps=6 lr=2e-05}"]
    assert set(report["perplexity"]) >= {"dense", "before", "converted", "static_pruned"}
    assert report["perplexity"]["before"] == pytest.approx(before["perplexity"]["converted"], rel=1e-6)
    assert routed == [True, False], "the converted model, then the pruned one"
    losses = [loss for _, loss in report["healing"]["curve"]]
    assert min(losses) < losses[0], losses
    assert report["healing"]["steps"] == 6
    assert report["parity"][0]["relative_error"] <= 1e-4
    assert not (place / "healed.part").exists()
    assert bundle.open_bundle(place / "out").manifest.passes[-1].spec == before["passes"][-1], "the old bundle stays"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "dyncomp"]
    subprocess.run([*command, "heal", "out", "-o", "together", *options, "--backend", "torch"], cwd=place, check=True, timeout=300)
    alone, together = (load_file(place / name / "weights.safetensors") for name in ("healed", "together"))
    assert alone.keys() == together.keys()
    assert all(relative_error(together[name], value) < 1e-3 for name, value in alone.items())
    assert not (place / "together.part").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "-o", "h"], "does not exist"),
        (["out", "-o", "h", "--minutes", "0"], "minutes or steps must be positive"),
        (["out", "-o", "h", "--option", "depth=3"], "no option 'depth'"),
        (["out", "-o", "text.txt", "--steps", "1"], "is a file"),
        (["out", "-o", "h", "--steps", "1", "--text", "none.txt"], "no text 'none.txt'"),
        (["out", "-o", "h", "--steps", "1", "--text", "news"], "every document of 'news' is one that the model is evaluated on"),
    ],
)
def test_heal_refuses_in_one_message(place, monkeypatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(DyncompError, match=message):
        cli.main(["heal", *arguments], standalone_mode=False)


def test_inspect_shows_what_was_rewritten(place) -> None:
    text = run(place, "inspect", "out")
    assert "carve-experts{experts=8 shared=2}" in text
    assert "layers.1.mlp" in text
    assert "layers.0.mlp" in text
    assert "placement: ort" in text
    assert "CPUExecutionProvider" in text
    assert "routed_ffn" in run(place, "inspect", "out", "--graph")
    diff = run(place, "inspect", "out", "--diff")
    assert any(line.startswith("-") and "silu" in line for line in diff.splitlines())
    assert any(line.startswith("+") and "dyncomp.routed_ffn" in line for line in diff.splitlines())
    assert "share of tokens" in run(place, "inspect", "out", "--experts")
    assert json.loads(run(place, "inspect", "out", "--json"))["source"]["name"] == "model"


def test_inspect_shows_what_a_model_has(place) -> None:
    text = run(place, "inspect", "model")
    assert "FFNs: 2" in text
    assert "gated silu" in text
    assert "scaled_dot_product_attention" in run(place, "inspect", "model", "--graph")
    facts = json.loads(run(place, "inspect", "model", "--json"))
    assert len(facts["ffns"]) == 2
    assert facts["head"]["tied"] is True


def test_run_streams_what_the_graph_generates(place) -> None:
    prompt = "The river runs"
    ort = run(place, "run", "out", "--prompt", prompt, "--max-tokens", "12")
    assert ort.startswith(prompt)
    assert ort == run(place, "run", "out", "--prompt", prompt, "--max-tokens", "12", "--backend", "torch")
    assert ort == run(place, "run", "out", "--prompt", prompt, "--max-tokens", "12", "--speculate")
    drafted = json.loads(run(place, "run", "out", "--prompt", prompt, "--max-tokens", "12", "--draft", "out", "--json"))[0]
    assert ort == drafted["prompt"] + drafted["text"] + "\n"
    assert 0 < drafted["speculation"]["passes"] <= 12
    assert "one prompt at a time" in refused(place, "run", "out", "--prompt", prompt, "--prompt", "b", "--speculate")
    answers = json.loads(run(place, "run", "out", "--prompt", prompt, "--prompt", "A stone", "--max-tokens", "12", "--json"))
    assert prompt + answers[0]["text"] == ort.rstrip("\n")
    assert answers[0]["kv_cache"] is True
    sampled = [run(place, "run", "out", "--prompt", prompt, "--temperature", "1", "--seed", s, "--max-tokens", "12") for s in "112"]
    assert sampled[0] == sampled[1] != sampled[2]


def test_run_takes_prompts_from_a_file(place) -> None:
    (place / "prompts.txt").write_text("The river\n\nA slow stone\n")
    text = run(place, "run", "out", "--input", "prompts.txt", "--max-tokens", "4")
    assert text.count("--- ") == 2


def test_evaluate_on_questions(place) -> None:
    (place / "mine.jsonl").write_text('{"question": "a", "choices": ["b", "c d"], "answer": 1}\n' * 3)
    result = json.loads(run(place, "evaluate", "out", "--text", "other.txt", "--windows", "2", "--task", "mine.jsonl", "--json"))
    figures = result["tasks"]["mine"]
    assert figures["items"] == 3
    assert figures["chance"] == 0.5
    assert set(figures["accuracy"]) == {"dense", "converted"}
    low, high = result["quality"]["other.txt"]["intervals"]["increase"]["converted"]
    assert low <= result["quality"]["other.txt"]["increase"]["converted"] <= high
    (place / "questions.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(DyncompError, match=r"questions\.jsonl, line 1"):
        run(place, "evaluate", "out", "--task", "questions.jsonl")


def test_inspect_compares_routers(place) -> None:
    options = ["--routers", "--carve", "4", "--tokens", "2048", "--windows", "2", "--calibrate", "text.txt", "--json"]
    table = json.loads(run(place, "inspect", "model", *options))["routers"]
    rows = {row["router"]: row for row in table if row["gates"] in ("threshold", None)}
    assert set(rows) == {"oracle", *FAMILIES, "static"}
    assert rows["oracle"]["agreement"] > max(rows[name]["agreement"] for name in ("ridge", "mean-gate"))
    assert rows["oracle"]["layer_error"] < min(rows[name]["layer_error"] for name in ("ridge", "mean-gate"))
    assert rows["static"]["agreement"] is rows["static"]["load"] is None
    gates = {row["gates"]: row for row in table if row["router"] == "ridge"}
    assert list(gates) == ["threshold", "relative", "topk", "group-topk", "deepseek-v3"]
    for name, row in gates.items():
        assert row["active"] == pytest.approx(0.75, abs=1e-6 if "topk" in name or name == "deepseek-v3" else 0.15), name
        assert row["load"]["most_used"] == 1, "a shared expert"
        assert 0 <= row["load"]["least_used"] <= 0.75
    with pytest.raises(DyncompError, match="needs a dense model"):
        run(place, "inspect", "out", "--routers")


def test_gates_across_tokens_are_compared_on_encoders(place) -> None:
    loaded = load_model(str(write_encoder(place / "encoder")))
    rows = compare_routers(loaded, experts=8, active=0.5, tokens=2048, count=2, routers=("ridge",), text=str(place / "text.txt"))
    found = {row.gates: row for row in rows}
    assert list(found) == ["threshold", "relative", "topk", "group-topk", "deepseek-v3", "expert-choice", "sinkhorn"]
    uneven = {name: row.load["most_used"] - row.load["least_used"] for name, row in found.items()}
    assert found["expert-choice"].load["spread"] > 0.99, "experts that choose have equal loads"
    assert all(found["expert-choice"].active == pytest.approx(row.active, abs=0.1) for row in rows)
    assert uneven["topk"] > uneven["sinkhorn"], uneven


def test_a_router_that_collapsed_is_named(place) -> None:
    load = {"least_used": 0.0, "most_used": 1.0, "unused_experts": 5.0, "spread": 0.0, "collapsed": 1.0}
    shown = {"agreement": 0.5, "layer_error": 0.1, "loss": 0.2, "interval": None, "active": 0.5, "seconds": 1.0}
    rows = [{"router": "ridge", "gates": gates, "load": value} | shown for gates, value in (("topk", load), ("relative", None))]
    console = Console(file=io.StringIO(), width=160)
    console.print(router_table(rows, "routers", "causal-lm"))
    text = console.file.getvalue()
    assert "collapsed in some layer (next to the same experts for every token): ridge, topk" in text
    assert "0% to 100%" in text
    report = bundle.open_bundle(place / "out").report()
    loads = next(iter(report["quality"].values()))["load_by_region"]
    loads[next(iter(loads))][3:5] = [0, 0]
    console.print(experts_table(SimpleNamespace(report=lambda: report)))
    assert "never used" in console.file.getvalue()
    unused = [str(sum(v == 0 for v in load)) for load in loads.values()]
    assert int(unused[0]) >= 2
    assert unused[0] in next(line for line in console.file.getvalue().splitlines() if "layers.0.mlp" in line).split()


def test_evaluate_on_any_text(place) -> None:
    result = json.loads(run(place, "evaluate", "out", "--text", "other.txt", "--windows", "3", "--json"))
    figures = result["quality"]["other.txt"]
    assert figures["windows"] == 3
    assert figures["perplexity"]["dense"] > 1
    assert "perplexity" in run(place, "evaluate", "out", "--text", "other.txt", "--windows", "3")


def test_bench_beside_dense(place) -> None:
    entries = json.loads(run(place, "bench", "out", "--json", "--threads", "1", "--prefill", "32"))["bench"]
    assert {e["variant"] for e in entries} == {"dense", "converted"}
    assert all(e["threads"] == 1 and e["decode_tokens_per_s"] > 0 and e["prefill_tokens"] == 32 for e in entries)
    assert "decode tokens/s" in run(place, "bench", "out", "--prefill", "32")


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_a_quantized_conversion_stands_beside_dense_in_both_precisions(place) -> None:
    options = [*OPTIONS[:4], "--experts", "2", "--active", "80%", "--quantize", "int8"]
    report = json.loads(run(place, "convert", "model", "-o", "int8", *options, "--calibrate", "text.txt", "--json"))
    speeds = [(e["variant"], e["precision"]) for e in report["bench"]]
    assert speeds == [("dense", "fp32"), ("dense", "int8"), ("converted", "int8")]
    assert set(report["perplexity"]) >= {"dense", "quantized", "converted", "static_pruned"}
    assert abs(report["quality"]["held out"]["increase"]["quantized"]) < 0.05
    assert report["parity"][0]["precision"] == "int8"
    assert "quantize" in run(place, "inspect", "int8")
    assert run(place, "run", "int8", "--prompt", "The river", "--max-tokens", "4")
    better = report | {"bench": [e | {"decode_tokens_per_s": 100.0} for e in report["bench"]]}
    better["quality"]["held out"]["increase"] |= {"quantized": 0.005, "converted": 0.2}
    assert any("prefer --recipe dense --quantize int8" in line for line in notes(better))
    entries = json.loads(run(place, "bench", "int8", "--json", "--threads", "1", "--prefill", "32"))["bench"]
    assert [(e["variant"], e["precision"]) for e in entries] == speeds


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_a_dense_model_can_be_quantized_only(place) -> None:
    options = [*OPTIONS[:4], "--recipe", "dense", "--quantize", "int4", "--calibrate", "text.txt", "--json"]
    report = json.loads(run(place, "convert", "model", "-o", "int4", *options))
    assert set(report["perplexity"]) >= {"dense", "converted"}
    assert "static_pruned" not in report["perplexity"]
    assert abs(report["quality"]["held out"]["increase"]["converted"]) < 0.2
    assert report["passes"] == ["awq{symmetric=false}", "quantize{bits=4 symmetric=false method=gptq}"]
    assert report["parity"][0]["precision"] == "int4"
    assert [(e["variant"], e["precision"]) for e in report["bench"]] == [("dense", "fp32"), ("converted", "int4")]


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_a_model_with_its_cache_in_int8(place) -> None:
    write_checkpoint(place / "wide", heads=2)  # of 16 features, which the kernel takes
    options = [*OPTIONS[:4], "--quantize", "int8", "--kv-cache", "int8", "--recipe", "dense", "--calibrate", "text.txt", "--json"]
    report = json.loads(run(place, "convert", "wide", "-o", "cache8", *options))
    assert report["passes"] == ["quantize", "quantize-cache"]
    assert report["parity"][0]["relative_error"] <= 2e-2
    assert report["quality"]["held out"]["kl"]["converted"] > 0
    assert [(e["variant"], e["precision"]) for e in report["bench"]] == [("dense", "fp32"), ("dense", "int8"), ("converted", "int8")]
    config = json.loads((place / "cache8" / "artifacts" / "ort" / "config.json").read_text())
    assert config["kv_cache"]["bytes_per_token"] == 2 * (32 + 8)
    assert run(place, "run", "cache8", "--prompt", "The river", "--max-tokens", "8")
    with pytest.raises(DyncompError, match="onnxruntime-genai allocates one in float"):
        run(place, "export", "cache8", "-o", "genai8", "--backend", "genai")


@pytest.mark.skipif(not available(), reason="no C++ compiler here")
def test_a_quantized_model_through_tvm(place) -> None:
    pytest.importorskip("tvm")
    options = [*OPTIONS[:4], "--recipe", "dense", "--quantize", "int8", "--backend", "tvm", "--calibrate", "text.txt", "--json"]
    report = json.loads(run(place, "convert", "model", "-o", "tvm8", *options))
    assert report["parity"][0]["relative_error"] <= 2e-2
    speeds = [(e["engine"], e["variant"], e["precision"]) for e in report["bench"]]
    assert speeds[0] == ("dyncomp-tvm", "dense", "fp32")
    assert speeds[-1] == ("dyncomp-tvm", "converted", "int8")
    assert run(place, "run", "tvm8", "--backend", "tvm", "--prompt", "The river", "--max-tokens", "4")
    (place / "prompts.txt").write_text("The river\nA boat on the river\nThe\n")
    served = json.loads(
        run(place, "run", "tvm8", "--backend", "tvm", "--input", "prompts.txt", "--slots", "2", "--max-tokens", "6", "--json")
    )
    for entry in served:
        alone = ["run", "tvm8", "--backend", "tvm", "--prompt", entry["prompt"], "--max-tokens", "6"]
        assert run(place, *alone) == run(place, *alone, "--speculate") == f"{entry['prompt']}{entry['text']}\n"
    assert {e["engine"] for e in served} == {"dyncomp-tvm"}
    entries = json.loads(run(place, "bench", "tvm8", "--backend", "tvm", "--json", "--threads", "1", "--prefill", "32"))["bench"]
    assert [(e["engine"], e["variant"], e["precision"]) for e in entries] == speeds


def test_with_all_experts_the_converted_model_is_the_dense_one(place) -> None:
    (place / "all.toml").write_text('passes = "carve-experts{experts=4 keep-dense=}"\n')
    report = json.loads(
        run(place, "convert", "model", "-o", "all", *OPTIONS[:4], "--calibrate", "text.txt", "--recipe", "all.toml", "--json")
    )
    assert abs(report["quality"]["held out"]["increase"]["converted"]) < 1e-5
    assert report["quality"]["held out"]["kl"]["converted"] < 1e-6


def test_a_flipped_byte_stops_every_command(place, tmp_path) -> None:
    shutil.copytree(place / "out", tmp_path / "out")
    file = tmp_path / "out" / "artifacts" / "ort" / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    for command in (["inspect", "out"], ["run", "out", "--prompt", "x"], ["bench", "out"], ["evaluate", "out"]):
        with pytest.raises(DyncompError, match=r"model.onnx.data was changed"):
            run(tmp_path, *command)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--active", "0"], "not a fraction of the FFN neurons"),
        (["--active", "150%"], "150%"),
        (["--active", "75"], "did you mean 75%"),
        (["--active", "most"], "'most' is not a fraction"),
        (["--experts", "7"], "7 experts do not divide the FFN width 64"),
        (["--recipe", "magic"], "no recipe 'magic'"),
        (["--recipe", "dense"], "changes nothing by itself"),
        (["--quantize", "int3"], "unknown precision 'int3'"),
        (["--kv-cache", "int8"], "a search does not try caches"),
        (["--quantize", "int8", "--kv-cache", "int4"], "unknown precision 'int4' of a KV cache"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--calibrate", "empty.txt"], "empty"),
        (["--calibrate", "missing.txt"], "missing.txt"),
        (["--calibrate", "short.txt"], "less than one window"),
    ],
)
def test_bad_requests_are_refused_with_a_message(place, monkeypatch, arguments: list[str], words: str) -> None:
    (place / "empty.txt").write_text("")
    (place / "short.txt").write_text("The river.\n\n\nThe stone.\n\n\nThe door.")
    command = ["convert", "model", "-o", "bad", "--tokens", "2048", "--windows", "1", "--calibrate", "text.txt", *arguments]
    monkeypatch.chdir(place)
    result = CliRunner().invoke(cli, command)
    code = getattr(result.exception, "exit_code", result.exit_code)
    assert code == 2, result.output
    assert words in result.output + str(result.exception)
    assert not list(place.glob("bad*"))


def test_errors_at_the_shell_are_one_message_and_an_exit_code(place) -> None:
    message = refused_at_the_shell(place, "convert", "nowhere.gguf", "-o", "bad")
    assert message.startswith("error: no such file: nowhere.gguf")
    assert "->" in message
    assert "No such command 'convrt'" in refused(place, "convrt")
    assert "-o" in refused(place, "convert", "model")


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_continues(place, monkeypatch) -> None:
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    arguments = ["convert", "model", "-o", "full", *OPTIONS, "--calibrate", "text.txt", "--backend", "torch", "--json"]
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "save_graph", full)
        with pytest.raises(DyncompError, match="the disk is full"):
            run(place, *arguments)
    assert not (place / "full").exists()
    assert (place / "full.part").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(FitRouter, "visit", full)  # what was finished is not done again
        run(place, *arguments)
    assert bundle.open_bundle(place / "full").manifest.passes
    assert not (place / "full.part").exists()


def test_a_conversion_interrupted_and_continued_gives_the_same_bundle(place, monkeypatch) -> None:
    arguments = ["convert", "model", "-o", "again", *OPTIONS, "--calibrate", "text.txt", "--backend", "torch", "--json"]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for owner, name in ((workspace.Workspace, "stage"), (convert, "cost_figures")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupt)
            run(place, *arguments, code=1)  # click's test runner turns the interrupt into exit code 1
        assert not (place / "again").exists()
    run(place, *arguments)
    first, second = (bundle.open_bundle(place / name).graph().constants() for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_ctrl_c_at_the_shell(place) -> None:
    command = [sys.executable, "-c", "from dyncomp.cli import main; main()", "convert", "model", "-o", "stopped", "--calibrate", "text.txt"]
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored, and a child inherits that
    try:
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, kept)
    deadline = time.monotonic() + 120
    while not (place / "stopped.part").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    assert not (place / "stopped").exists()


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_is_asked_for(place, device: str) -> None:
    for command in (("run", "out", "--prompt", "The river"), ("bench", "out")):
        told = refused(place, *command, "--device", device)
        assert "ExecutionProvider" in told
        assert "pip install onnxruntime-gpu" in told
    record = json.loads(run(place, "export", "out", "-o", f"for-{device}", "--backend", "ort", "--device", device, "--json"))
    assert record["device"] == device
    assert record["check"]["relative_error"] <= 2e-2
    assert any("float16" in note for note in record["notes"])
    config = json.loads((place / f"for-{device}" / "config.json").read_text())
    assert not [name for name in config["operators"] if name.startswith("dyncomp.")]
    assert not (place / f"for-{device}" / "dyncomp_ort.so").exists()


SLOW_LINKER = """#!/bin/sh
# A C++ compiler that links in two halves; between them it waits until another has come as far.
out=; next=; shared=
for word; do
  if [ "$next" ]; then out=$word; next=; fi
  case $word in -o) next=1;; -shared) shared=1;; esac
done
if ! [ "$shared" ]; then exec {compiler} "$@"; fi
{compiler} "$@" || exit 1
whole=$(mktemp {folder}/XXXXXX.whole)
cp "$out" "$whole"
head -c 1000 "$whole" > "$out"
touch {folder}/$$.half
tries=0
while [ $(ls {folder}/*.half | wc -l) -lt 2 ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1)); done
tail -c +1001 "$whole" >> "$out"
"""


@pytest.mark.skipif(not available(), reason="no C++ compiler")
def test_two_processes_on_one_bundle_with_a_new_cache(place, tmp_path) -> None:
    library()  # compiled, so that its object files need only be linked
    compiled, cache, tools = cache_folder() / "native", tmp_path / "cache", tmp_path / "tools"
    (cache / "native").mkdir(parents=True)
    tools.mkdir()
    for file in compiled.glob("*.o"):
        shutil.copy(file, cache / "native")
    linker = tools / "c++"
    linker.write_text(SLOW_LINKER.format(compiler=shutil.which("c++"), folder=tools))
    linker.chmod(0o755)
    command = [sys.executable, "-c", "from dyncomp.cli import main; main()", "run", "out", "--prompt", "The river", "--max-tokens", "12"]
    environment = os.environ | {"DYNCOMP_CACHE": str(cache), "PATH": f"{tools}:{os.environ['PATH']}"}
    environment.pop("CXX", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen(command, cwd=place, env=environment, **pipes)
    while not list(tools.glob("*.half")) and first.poll() is None:
        time.sleep(0.05)
    processes = [first, subprocess.Popen(command, cwd=place, env=environment, **pipes)]  # begins beside half a library
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert len(list(tools.glob("*.half"))) == 2, "each made its own"
    assert outputs[0][0] == outputs[1][0] == run(place, "run", "out", "--prompt", "The river", "--max-tokens", "12")
    assert len(list((cache / "native").glob("*.so"))) == 1
    assert not list((cache / "native").glob("building-*"))


def test_only_bundles_are_overwritten(place) -> None:
    (place / "thesis").mkdir()
    (place / "thesis" / "chapter1.tex").write_text("years")
    with pytest.raises(DyncompError, match="not a dyncomp bundle"):
        run(place, "convert", "model", "-o", "thesis", "--calibrate", "text.txt")
    assert (place / "thesis" / "chapter1.tex").read_text() == "years"


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for name in ("convert", "inspect", "evaluate", "run", "bench"):
        assert name in text
        assert "Usage" in CliRunner().invoke(cli, [name, "--help"]).output
    assert main is not None
