"""Exports: stock programs load what is written and compute what the graph computes; what a format cannot hold is said."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import dyncomp.backends.hf.write
import dyncomp.passes  # registers the passes
import pytest
import torch
from dyncomp.backends.gguf.check import available as gguf_available
from dyncomp.backends.gguf.check import compare as gguf_compare
from dyncomp.backends.gguf.write import encode
from dyncomp.backends.gguf.write import write as gguf_write
from dyncomp.backends.hf.architectures import ARCHITECTURES
from dyncomp.backends.hf.check import compare, settle_ties
from dyncomp.backends.hf.write import choose, explain, write
from helpers import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_cli import run
from tiny_checkpoint import write_checkpoint, write_text
from transformers import AutoTokenizer, GenerationConfig

from bench.tiny import VOCAB, built, trace_tiny
from dyncomp import bundle
from dyncomp.bundle import Manifest, Source
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.errors import BackendError, PassError, RequestError
from dyncomp.export import ExportRequest, export
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel, load_model
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.quantized import round_to_nearest
from dyncomp.regions import find_regions, find_routed
from dyncomp.regions.decoder import Decoder, find_decoder
from dyncomp.text import load_text, windows
from dyncomp.trace import trace_model

SHARED = "carve-experts{experts=8 shared=2 keep-dense=}, fit-router{gates=topk k=4 bias=false}, refit-down{bias=false}"
UNSHARED = "carve-experts{experts=8 keep-dense=}, fit-router{gates=topk k=3 bias=false}, refit-down{bias=false}"
FIRST_DENSE = "carve-experts{experts=8 shared=2 keep-dense=0}, fit-router{gates=topk k=4}, refit-down{bias=false}"
NARROW = "carve-experts{experts=32 shared=4 keep-dense=}, fit-router{gates=topk k=8 bias=false}, refit-down{bias=false}"
SOFTMAX = "carve-experts{experts=8 shared=2 keep-dense=}, fit-router{gates=topk k=4 bias=false temper=2}, refit-down{bias=false}"
SOFTMAX_UNSHARED = "carve-experts{experts=8 keep-dense=}, fit-router{gates=topk k=3 bias=false temper=2}, refit-down{bias=false}"
GROUPS = "carve-experts{experts=8 shared=2 keep-dense=0}, fit-router{gates=group-topk groups=3 kept=2 k=4}, refit-down{bias=false}"
THRESHOLDS = "carve-experts{experts=8}, fit-router{active=75%}, refit-down"


@functools.cache
def converted(name: str, passes: str) -> Graph:
    """A tiny model after some passes, calibrated on random tokens."""
    graph, dense = trace_tiny(name), trace_tiny(name)
    batches = [{"input_ids": torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(i))} for i in range(4)]
    calibration = Calibration(batches, name)
    calibrate(dense, find_regions(dense).ffns, calibration)
    Pipeline(parse_passes(passes)).run(graph, Context(calibration, dense=dense))
    return graph


def written(graph: Graph, architecture: str, folder: Path, temper: int | None = None) -> dict:
    found, decoder, shape = choose(graph, architecture)
    temper = found.temper if temper is None else temper
    write(decoder, shape, found, folder, source={}, temper=temper, dtype=torch.float32)
    return compare(decoder, found, folder, None)


ONES = [
    ("llama", SHARED, "granite-moe"),
    ("llama", FIRST_DENSE, "glm4-moe"),
    ("llama", SHARED, "qwen2-moe"),
    ("llama", UNSHARED, "mixtral"),
]
AS_THEY_ARE = [
    ("llama", SOFTMAX, "granite-moe"), ("llama", SOFTMAX, "qwen2-moe"), ("llama", SOFTMAX.replace("dense=", "dense=0"), "qwen2-moe"),
    ("llama", SOFTMAX_UNSHARED, "mixtral"), ("llama", SOFTMAX_UNSHARED, "granite-moe"), ("qwen3", SOFTMAX_UNSHARED, "qwen3-moe"),
    ("llama", "upcycle", "mixtral"), ("llama", "upcycle{k=1}", "granite-moe"), ("mixtral", "", "mixtral"), ("mixtral", "", "granite-moe"),
    ("llama", "upcycle{gates=deepseek-v3 k=3}", "glm4-moe"), ("llama", "upcycle{gates=deepseek-v3 k=2 groups=2 kept=1}", "glm4-moe"),
    *(("llama", "upcycle{experts=7 k=4 parts=4 shared=1}", architecture) for architecture in ("granite-moe", "qwen2-moe")),
    ("llama", "upcycle{experts=13 k=4 parts=4 shared=1 gates=deepseek-v3 groups=2 kept=1}", "glm4-moe"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "passes", "architecture"), ONES)
def test_stock_classes_come_near_gates_of_one(model: str, passes: str, architecture: str, tmp_path) -> None:
    found = written(converted(model, passes), architecture, tmp_path)
    assert found["class"].lower().startswith(ARCHITECTURES[architecture].model_type.replace("_", ""))
    assert found["median_error"] < 2e-3
    if architecture == "granite-moe":  # chooses by scores, not by probabilities: no ties
        assert found["relative_error"] < 2e-4
        assert found["greedy_equal"] == found["greedy_tokens"] > 40
        assert found["other_experts"] == 0


@pytest.mark.parametrize(("model", "passes", "architecture"), AS_THEY_ARE)
def test_gates_by_softmax_are_written_as_they_are(model: str, passes: str, architecture: str, tmp_path) -> None:
    found = written(converted(model, passes), architecture, tmp_path)
    assert found["class"].lower().startswith(ARCHITECTURES[architecture].model_type.replace("_", ""))
    assert found["relative_error"] < 1e-5
    assert found["greedy_equal"] == found["greedy_tokens"] == 64
    assert found.get("other_experts", 0) == 0
    assert (found["positions"] == 72) == bool(find_routed(converted(model, passes)))


def test_experts_that_tie_may_be_either(tmp_path) -> None:
    """Two that score alike to the last digits change places by rounding; one that scores higher by more than that may not."""
    graph = converted("llama", SOFTMAX).copy()
    for region in find_routed(graph):
        weight = graph.tensor(f"{region.name}.router.weight").detach().clone()
        weight[4:6] = weight[3]
        graph.add_tensor(f"{region.name}.router.weight", weight)
    found, decoder, shape = choose(graph, "granite-moe")
    for row, by, alike in ((3, 4e-7, True), (0, -9.0, False)):  # of the experts that are not shared: 5, which ties with 3 and 4, and 2
        write(decoder, shape, found, tmp_path, source={}, temper=found.temper, dtype=torch.float32)
        tensors = load_file(tmp_path / "model.safetensors")
        for name, value in tensors.items():
            if "router" in name:
                value[row] *= 1 + by
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        record = compare(decoder, found, tmp_path, None)
        assert (record["relative_error"] < 1e-4) == alike
        assert (record["ties"] > 0) >= alike
        assert (record["other_experts"] == 0) == alike


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_settling_ties_changes_no_score_that_decides(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 6, 9, generator=generator)
    scores[0, :3, 4] = scores[0, :3, 3] * (1 + 1e-7)
    chosen = torch.randn(6, 7, generator=generator).topk(3).indices
    settled, tied = settle_ties(scores, chosen, 2)
    assert float((settled - scores).abs().max()) <= 2e-5 * float(scores.abs().max())
    assert torch.equal(settled[0, ~tied], scores[0, ~tied])
    assert torch.equal(settled[0, tied, 2:].topk(3).indices.sort().values, chosen[tied].sort().values)


def test_biases_are_written_where_a_server_reads_them_whatever_the_configuration_says(tmp_path) -> None:
    """vLLM's Qwen2Moe: without them it computed with memory that nothing had set, and gave no number."""
    written(converted("llama", SOFTMAX), "qwen2-moe", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["qkv_bias"]
    tensors = load_file(tmp_path / "model.safetensors")
    for part, features in (("q", 32), ("k", 16), ("v", 16)):
        assert torch.equal(tensors[f"model.layers.1.self_attn.{part}_proj.bias"], torch.zeros(features))


def test_a_bias_that_chooses_stays_one(tmp_path) -> None:
    """DeepSeek-V3's, added to sigmoids where experts are chosen, and in no weight."""
    graph = converted("llama", "upcycle{gates=deepseek-v3 k=3}").copy()
    for seed, region in enumerate(find_routed(graph)):
        bias = torch.randn(8, generator=torch.Generator().manual_seed(seed)) / 4
        graph.add_tensor(f"{region.name}.router.bias", bias)
    found = written(graph, "glm4-moe", tmp_path)
    assert found["relative_error"] < 1e-5
    assert found["other_experts"] == 0


def test_a_mixture_comes_back_as_the_checkpoint_it_was(tmp_path) -> None:
    """A tiny Mixtral, read, traced, written: tensor by tensor what it was."""
    written(trace_tiny("mixtral"), "mixtral", tmp_path / "again")
    built("mixtral")[0].model.save_pretrained(tmp_path / "was")
    was, again = (load_file(tmp_path / name / "model.safetensors") for name in ("was", "again"))
    assert was.keys() == again.keys()
    assert all(torch.allclose(was[name], again[name], rtol=1e-6) for name in was)


def test_the_positions_at_which_other_experts_run_are_counted(tmp_path, monkeypatch) -> None:
    graph = converted("llama", SOFTMAX)
    architecture, decoder, shape = choose(graph, "granite-moe")
    monkeypatch.setattr(dyncomp.backends.hf.write, "tensors", spoiled(dyncomp.backends.hf.write.tensors))
    write(decoder, shape, architecture, tmp_path, source={}, temper=0, dtype=torch.float32)
    found = compare(decoder, architecture, tmp_path, None)
    assert found["positions"] / 2 < found["other_experts"] <= found["positions"]
    assert found["relative_error"] > 1e-2


@pytest.mark.parametrize(("model", "passes", "architecture"), ONES[:2])
def test_a_colder_router_is_closer(model: str, passes: str, architecture: str, tmp_path) -> None:
    early, late = (written(converted(model, passes), architecture, tmp_path / str(p), p)["median_error"] for p in (8, 14))
    assert late < 2e-4
    assert early > 8 * late


@pytest.mark.parametrize(
    ("model", "passes", "class_name"),
    [
        ("llama", "", "LlamaForCausalLM"), ("qwen2", "", "Qwen2ForCausalLM"), ("qwen3", "", "Qwen3ForCausalLM"),
        ("llama", "prune-static{active=50% keep-dense=}", "LlamaForCausalLM"), ("llama", "quantize", "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_what_is_not_routed_is_a_stock_dense_model(model: str, passes: str, class_name: str, tmp_path) -> None:
    found = written(converted(model, passes), "auto", tmp_path)
    assert found["class"] == class_name
    assert found["relative_error"] < 1e-5
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mlp_bias" if "prune" in passes else "rms_norm_eps"]
    assert "prune" not in passes or config["intermediate_size"] == 32


def test_what_an_architecture_cannot_hold_is_said() -> None:
    _, _, first = explain(converted("llama", FIRST_DENSE))
    assert "router has no bias" in first["granite-moe"][0]
    assert "every layer has experts" in first["granite-moe"][1]
    assert first["glm4-moe"] == []
    assert any("no shared experts" in reason for reason in first["mixtral"])
    assert "threshold gates" in explain(converted("llama", THRESHOLDS))[2]["granite-moe"][0]
    assert any(
        "no biases" in r for r in explain(converted("llama", SHARED.replace("refit-down{bias=false}", "refit-down")))[2]["qwen2-moe"]
    )
    assert any("experts of 2 neurons" in reason for reason in explain(converted("llama", NARROW))[2]["granite-moe"])
    assert any("in 2 of 3 groups" in r for r in explain(converted("llama", GROUPS))[2]["granite-moe"])
    assert explain(converted("llama", GROUPS))[2]["glm4-moe"] == []
    assert any("depend on more" in r for r in explain(converted("llama", "upcycle{gates=tree}"))[2]["mixtral"])
    widths = explain(converted("llama", "prune-static{active=75% keep-dense=0}"))[2]["llama"]
    assert any("widths" in reason and "keep-dense" in reason for reason in widths)
    with pytest.raises(BackendError, match="threshold gates") as error:
        choose(converted("llama", THRESHOLDS), "auto")
    assert "granite-moe" in str(error.value)
    with pytest.raises(RequestError, match="no architecture 'gpt5'"):
        choose(trace_tiny("llama"), "gpt5")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "what follows the embedding is no layer"), ("phi3", "found slice"), ("gptj", "parallel"),
        ("bert", "not token ids alone"),
    ],
)  # fmt: skip
def test_other_decoders_are_refused_by_what_they_do(name: str, reason: str) -> None:
    found = find_decoder(trace_tiny(name))
    assert not isinstance(found, Decoder)
    assert reason in found.reason


def make_bundle(folder: Path, graph: Graph) -> Path:
    part = folder / "made.part"
    part.mkdir()
    report = {"versions": {"dyncomp": "x"}, "quality": {"held out": {"perplexity": {"dense": 10.0, "converted": 12.5, "windows": 2}}}}
    bundle.save_bundle_files(part, graph, report)
    source = Source(name="tiny", kind="factory", task="causal-lm", fingerprint="f", context_length=64, output_name="logits", config={})
    bundle.seal(part, folder / "made", Manifest(source=source, recipe="none", passes=[], refusals=[], versions={}))
    return folder / "made"


def test_an_export_is_whole_with_a_card_or_not_there(tmp_path, monkeypatch) -> None:
    made, out = make_bundle(tmp_path, converted("llama", SHARED)), tmp_path / "out"
    record = export(ExportRequest(made, out))
    assert record["architecture"] == "granite-moe"
    assert record["temper"] == 14
    assert record["check"]["relative_error"] < 2e-4
    card = (out / "README.md").read_text()
    assert "| held out | 10.00 | 12.50 |" in card
    assert "GraniteMoeSharedForCausalLM" in card
    assert json.loads((out / "dyncomp-export.json").read_text())["check"] == record["check"]
    before = sorted(f.name for f in out.iterdir())
    monkeypatch.setattr(dyncomp.backends.hf.write, "tensors", spoiled(dyncomp.backends.hf.write.tensors))
    with pytest.raises(PassError, match="logits differ from the graph's"):
        export(ExportRequest(made, out))
    assert sorted(f.name for f in out.iterdir()) == before
    assert not list(tmp_path.glob("out.*"))


def spoiled(tensors):
    """``tensors`` with the rows of one router in another order: what a wrong mapping would be."""

    def wrong(architecture, decoder, shape, temper, dtype):
        found = tensors(architecture, decoder, shape, temper, dtype)
        name = f"model.layers.1.{architecture.router}"
        return found | {name: found[name].flip(0).contiguous()}

    return wrong


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a checkpoint that has a tokenizer and sampling settings, and a bundle ``made`` by the recipe for exports."""
    folder = tmp_path_factory.mktemp("exports")
    write_checkpoint(folder / "model")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [0, 5], "repetition_penalty": 1.5}
    (folder / "model" / "generation_config.json").write_text(json.dumps(settings))
    write_text(folder / "text.txt")
    options = ["--recipe", "granite-moe", "--experts", "8", "--tokens", "4096", "--windows", "2", "--backend", "torch"]
    run(folder, "convert", "model", "-o", "made", *options, "--calibrate", "text.txt")
    return folder


def test_the_command_writes_shards_tokenizer_and_sampling_settings(place: Path, monkeypatch) -> None:
    monkeypatch.setattr(dyncomp.backends.hf.write, "SHARD", "40KB")
    out = place / "served"
    record = json.loads(run(place, "export", "made", "-o", "served", "--backend", "hf", "--json"))
    assert record["architecture"] == "granite-moe"
    assert "temper" not in record, "its gates are those of the class"
    assert record["check"]["relative_error"] < 1e-5
    assert record["check"]["greedy_equal"] == record["check"]["greedy_tokens"] == 64
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    assert all((out / shard).is_file() for shard in index.values())
    sentence = "The old river runs under a new door."
    theirs = AutoTokenizer.from_pretrained(out)(sentence)["input_ids"]
    assert theirs == load_model(str(place / "model")).tokenizer(sentence)["input_ids"]
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.eos_token_id) == (True, 0.6, 0.9, [0, 5])
    shown = run(place, "export", "made", "-o", "served", "--architecture", "qwen2-moe")  # an earlier export is replaced
    assert "greedy equal: 64" in shown
    assert not (out / "model.safetensors.index.json").exists() or "qwen2" in (out / "config.json").read_text()


def test_the_command_explains(place: Path) -> None:
    lines = run(place, "export", "made", "--explain").splitlines()
    assert "granite-moe: can hold it" in lines
    (glm,) = (line for line in lines if line.startswith("glm4-moe"))
    assert "its gates are a sigmoid over the experts that run, the model's a softmax over the experts that run" in glm
    assert json.loads(run(place, "export", "made", "--explain", "--json"))["granite-moe"] == []
    assert not (place / "explained").exists()
    with pytest.raises(RequestError, match="--temper is for models whose gates are 1"):
        run(place, "export", "made", "-o", "explained", "--temper", "12")


def test_settings_that_transformers_does_not_write_are_named(tmp_path) -> None:
    architecture, decoder, shape = choose(trace_tiny("llama"), "llama")
    wrong = {"do_sample": False, "temperature": 0.6}
    options: dict = {"source": {}, "temper": 0, "dtype": torch.float32}
    (note,) = write(decoder, shape, architecture, tmp_path, **options, generation=wrong)
    assert "settings are left out" in note
    assert compare(decoder, architecture, tmp_path, None)["greedy_equal"] == 64
    assert write(decoder, shape, architecture, tmp_path, **options, generation={"do_sample": True, "temperature": 0.6}) == []
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.6


def test_requests_that_cannot_be_served_are_named(tmp_path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    for options, words in (
        ({"out": taken}, "not an earlier export"),
        ({"dtype": "float16"}, "float16"),
        ({"temper": 40}, "--temper 40"),
        ({"backend": "tarot"}, "unknown backend"),
        ({"out": tmp_path / "a" / "b"}, "does not exist"),
    ):
        with pytest.raises(RequestError, match=words):
            ExportRequest(**{"bundle": tmp_path, "out": tmp_path / "new", **options}).validate()


@pytest.mark.parametrize(("model", "passes", "architecture"), [("llama", "", "llama"), ("qwen2", "", "qwen2"), AS_THEY_ARE[0]])
def test_llama_cpp_computes_the_same(model: str, passes: str, architecture: str, tmp_path) -> None:
    if gguf_available() is None:
        pytest.skip("no package here brings llama.cpp")
    graph = converted(model, passes)
    found, decoder, shape = choose(graph, architecture)
    assert set(gguf_write(decoder, shape, found, tmp_path / "m.gguf", temper=found.temper, tokenizer=None)) == {"F32"}
    measured = gguf_compare(graph, tmp_path / "m.gguf")
    assert measured["relative_error"] < 1e-5
    assert measured["greedy_equal"] == measured["greedy_tokens"] == 64


@pytest.mark.parametrize(("bits", "symmetric", "name"), [(8, True, "Q8_0"), (4, False, "Q4_1")])
def test_codes_are_in_a_gguf_file_as_they_are(bits: int, symmetric: bool, name: str) -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    value = round_to_nearest(torch.randn(6, 96, generator=torch.Generator().manual_seed(0)), bits, 32, symmetric=symmetric)
    data, form = encode(value)
    assert form == name
    assert torch.equal(torch.from_numpy(dequantize(data, GGMLQuantizationType[form])), value.decode())
    assert encode(round_to_nearest(torch.randn(4, 64), bits, 64, symmetric=symmetric)) is None
    assert encode(round_to_nearest(torch.randn(4, 64), bits, 32, symmetric=not symmetric)) is None


@pytest.mark.parametrize("backend", ["ort", "pt2"])
def test_programs_are_whole_folders_that_compute_the_same(backend: str, tmp_path) -> None:
    graph = converted("llama", SHARED).copy()
    if backend == "pt2":
        dyncomp.passes.QuantizeCache().run(graph, Context())  # which it leaves to the program that has the cache
    record = export(ExportRequest(make_bundle(tmp_path, graph), tmp_path / "out", backend=backend))
    assert record["check"]["relative_error"] < 1e-4
    assert any("keys and values are not rounded" in note for note in record["notes"]) == (backend == "pt2")
    assert (tmp_path / "out" / {"ort": "model.onnx", "pt2": "model.pt2"}[backend]).is_file()
    assert any({"ort": "onnxruntime-genai", "pt2": "dyncomp.ops"}[backend] in note for note in record["notes"])
    if backend == "pt2":
        ids = torch.randint(2, VOCAB, (3, 9))
        again = load_model(str(tmp_path / "out" / "model.pt2")).module(input_ids=ids)
        assert_close(again, converted("llama", SHARED)(ids), rel=1e-5)


@pytest.fixture(scope="module")
def fitted() -> tuple[LoadedModel, Graph]:
    """SmolLM2 with routers fitted to a little real text: their scores lie close together, as those of random ones do not."""
    loaded = load_model("smollm2-135m")
    graph = trace_model(loaded)
    ids = windows(load_text("wikipedia"), loaded.tokenizer, length=256, tokens=768, seed=0)
    passes = "carve-experts{experts=8 shared=2 keep-dense= cluster=random}, fit-router{gates=topk k=6 bias=false temper=4}"
    Pipeline(parse_passes(passes)).run(graph, Context(Calibration([{"input_ids": ids}], "a little")))
    return loaded, graph


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["granite-moe", "qwen2-moe"])
def test_a_real_model_writes_the_same_text_in_a_stock_class(fitted: tuple[LoadedModel, Graph], architecture: str, tmp_path) -> None:
    """One chooses experts by scores, the other by probabilities in float32."""
    loaded, graph = fitted
    chosen, decoder, shape = choose(graph, architecture)
    write(decoder, shape, chosen, tmp_path, source=loaded.config, temper=0, dtype=torch.float32)
    found = compare(decoder, chosen, tmp_path, loaded.tokenizer)
    assert found["relative_error"] <= 2e-3
    assert found["greedy_equal"] == found["greedy_tokens"] == 64


@pytest.mark.slow
def test_a_real_model_writes_the_same_text_in_llama_cpp(fitted: tuple[LoadedModel, Graph], tmp_path) -> None:
    if gguf_available() is None:
        pytest.skip("no package here brings llama.cpp")
    loaded, graph = fitted
    chosen, decoder, shape = choose(graph, "granite-moe")
    assert set(gguf_write(decoder, shape, chosen, tmp_path / "m.gguf", temper=0, tokenizer=None)) == {"F32"}
    found = gguf_compare(graph, tmp_path / "m.gguf", loaded.tokenizer)
    assert found["relative_error"] <= 2e-3
    assert found["greedy_equal"] == found["greedy_tokens"] == 64
