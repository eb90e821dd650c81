"""Folders for onnxruntime-genai: what it feeds gives what the graph gives, and its configuration names what the ONNX model has."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dyncomp.backends.genai.check import FedModel
from dyncomp.backends.genai.write import configuration, feed_by_mask
from dyncomp.backends.native import available
from dyncomp.backends.torch.decoder import decoder_for
from helpers import assert_close
from tiny_checkpoint import prose, write_checkpoint

from dyncomp import bundle
from dyncomp.bundle import Manifest, Source
from dyncomp.deploy import with_cache
from dyncomp.errors import BackendError, DyncompError
from dyncomp.export import ExportRequest, export
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel, load_model
from dyncomp.pipeline import Context, Pipeline, parse_passes
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampling
from dyncomp.trace import trace_model

PROMPTS = [prose(5, 3)[:-1], prose(11, 4)[:-1]]
needs_genai = pytest.mark.skipif(importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is not installed")


@dataclass
class Made:
    loaded: LoadedModel
    graph: Graph
    folder: Path
    record: dict


def make_bundle(folder: Path, loaded: LoadedModel, graph: Graph) -> Path:
    part = folder / "made.part"
    part.mkdir()
    bundle.save_bundle_files(part, graph, {"versions": {"dyncomp": "x"}}, tokenizer=loaded.tokenizer)
    source = Source(name="tiny", kind=loaded.kind, task=loaded.task, fingerprint="f", context_length=loaded.context_length,
                    output_name="logits", config={})  # fmt: skip
    bundle.seal(part, folder / "made", Manifest(source=source, recipe="none", passes=[], refusals=[], versions={}))
    return folder / "made"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Graph]:
    loaded = load_model(str(write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", heads=2)))
    return loaded, trace_model(loaded)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, traced: tuple[LoadedModel, Graph]) -> Made:
    """A tiny Llama, exported; in int8 in dyncomp's kernels, attention too."""
    if request.param == "int8" and not available():
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp(request.param)
    loaded, graph = traced[0], traced[1].copy()
    if request.param == "int8":
        Pipeline(parse_passes("quantize")).run(graph, Context())
    record = export(ExportRequest(make_bundle(folder, loaded, graph), folder / "out", backend="genai"))
    return Made(loaded, graph, folder / "out", record)


def test_the_graph_counts_tokens_by_the_mask(traced: tuple[LoadedModel, Graph]) -> None:
    """Rows of different lengths in a padded prompt, then steps that write over the padding."""
    cached, _ = with_cache(traced[1])
    fed, reference = feed_by_mask(cached), decoder_for(cached)
    generator = np.random.default_rng(0)
    ids, lengths = generator.integers(2, 320, (2, 6)), np.array([6, 3])
    mask = torch.as_tensor(np.arange(6) < lengths[:, None]).long()
    caches = [torch.zeros(2, s.shape[1], 8, s.shape[3]) for s in fed.inputs[2:]]
    expected = reference.prefill(ids, lengths, 2)
    for _ in range(3):
        logits, *caches = fed(torch.as_tensor(ids), mask, *caches)
        assert logits.shape == (2, 1, 320)
        assert_close(logits[:, 0], torch.as_tensor(expected), rel=1e-5)
        if mask.shape[1] == 8:
            break
        ids = generator.integers(2, 320, (2, 1))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        expected = reference.step(ids[:, 0])


def test_the_configuration_names_what_the_model_has(made: Made) -> None:
    config = json.loads((made.folder / "genai_config.json").read_text())
    decoder, fed = config["model"]["decoder"], FedModel(made.folder)
    shapes = {i.name: i.shape for i in fed.onnx.get_inputs()}
    assert [*shapes] == ["input_ids", "attention_mask", *fed.past]
    assert len(fed.past) == 2 * decoder["num_hidden_layers"] == 4
    assert all(shapes[n][1::2] == [decoder["num_key_value_heads"], decoder["head_size"]] == [1, 16] for n in fed.past)
    outputs = {o.name: o.shape for o in fed.onnx.get_outputs()}
    assert [*outputs] == ["logits", *fed.present]
    assert outputs["logits"][1:] == [1, config["model"]["vocab_size"]], "genai takes logits of the last token alone by this shape"
    assert config["model"]["context_length"] == config["search"]["max_length"] == 128
    assert config["search"]["past_present_share_buffer"] is True
    assert config["model"]["eos_token_id"] == [made.loaded.tokenizer.eos_token_id]
    check, installed = made.record["check"], importlib.util.find_spec("onnxruntime_genai") is not None
    assert check["class"] == ("onnxruntime-genai" if installed else "ONNX Runtime, fed as by onnxruntime-genai")
    assert check["relative_error"] <= (0.1 if made.graph.quantized else 1e-4)
    kernels = decoder["session_options"].get("custom_ops_library")
    assert kernels == ("dyncomp_ort.so" if made.graph.quantized else None)
    assert (made.folder / "dyncomp_ort.so").is_file() == (kernels is not None)
    files = {f.name for f in made.folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "model.onnx", "model.onnx.data", "README.md"} <= files


def greedy(folder: Path, prompts: list[str], tokens: int) -> list[list[int]]:
    """What onnxruntime-genai makes of texts, by its own tokenizer, as one batch."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))
    tokenizer, parameters = onnxruntime_genai.Tokenizer(model), onnxruntime_genai.GeneratorParams(model)
    ids = tokenizer.encode_batch(prompts)
    ids = np.asarray(ids.as_numpy() if hasattr(ids, "as_numpy") else ids)
    parameters.set_search_options(batch_size=len(prompts), max_length=ids.shape[1] + tokens)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(t) for t in generator.get_sequence(row)][ids.shape[1] :] for row in range(len(prompts))]


def same_text(folder: Path, session, tokenizer, prompts: list[str]) -> None:
    """A batch, and each prompt alone, through onnxruntime-genai gives what dyncomp gives."""
    expected = [list(c.tokens) for c in Generator(session, tokenizer).generate(prompts, Sampling(max_tokens=32))]
    assert len(expected[0]) > 24
    for texts, wanted in ([prompts, expected], [prompts[:1], expected[:1]]):
        for found, tokens in zip(greedy(folder, texts, 32), wanted, strict=True):
            text = [t for t in tokens if t != tokenizer.eos_token_id]  # a single text is returned without its end
            assert found[: len(text)] == text
            assert all(t == tokenizer.eos_token_id for t in found[len(text) :])


@needs_genai
def test_genai_writes_the_same_text(made: Made) -> None:
    session = FedModel(made.folder).session() if made.graph.quantized else decoder_for(with_cache(made.graph)[0])
    same_text(made.folder, session, made.loaded.tokenizer, PROMPTS)


@pytest.mark.slow
@needs_genai
def test_a_real_model_writes_the_same_text_in_genai(tmp_path: Path) -> None:
    loaded = load_model("smollm2-135m")
    graph = trace_model(loaded)
    export(ExportRequest(make_bundle(tmp_path, loaded, graph), tmp_path / "out", backend="genai"))
    same_text(tmp_path / "out", decoder_for(with_cache(graph)[0]), loaded.tokenizer, ["The capital of France is", "Once"])


def test_what_genai_cannot_run_is_refused_by_name(traced: tuple[LoadedModel, Graph], tmp_path: Path) -> None:
    loaded, graph = traced
    endless = graph.copy()
    endless.info["context_length"] = None
    cases = [
        (replace(loaded, task="encoder"), graph, "an encoder"),
        (replace(loaded, tokenizer=None), graph, "no tokenizer"),
        (loaded, endless, "KV cache: the model's context length is unknown"),
    ]
    for number, (source, converted, words) in enumerate(cases):
        (folder := tmp_path / str(number)).mkdir()
        with pytest.raises(DyncompError, match=words):
            export(ExportRequest(make_bundle(folder, source, converted), folder / "out", backend="genai"))
        assert not (folder / "out").exists()
    layers = [{"kv_heads": 1, "key_dim": 16, "value_dim": size} for size in (16, 8)]
    endless.info["kv_cache"] = {"context_length": 128, "layers": layers}
    with pytest.raises(BackendError, match="attention 1 keeps keys of 16 and values of 8"):
        configuration(endless, loaded.tokenizer)
