"""Bundles of encoder–decoders: a tiny T5 through every command, on halves of a text and on pairs."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import own_cache
from test_cli import run
from tiny_checkpoint import prose, write_encoder_decoder, write_text
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

import dyncomp
from bench.tiny import tokens, trace_tiny
from dyncomp.bundle import open_bundle
from dyncomp.deploy import with_cache
from dyncomp.errors import BackendError, BundleError, ModelError, RequestError, TextError
from dyncomp.evaluate import evaluate, model_inputs
from dyncomp.examples import reader_of
from dyncomp.models import load_model
from dyncomp.models.factory import describe
from dyncomp.models.loaded import Decoding
from dyncomp.models.wrap import wrap
from dyncomp.rows import ABSENT, is_pairs, split_rows
from dyncomp.search import SELECTION, selection_size
from dyncomp.text import Corpus, Pairs, load_pairs, pairs, split
from dyncomp.trace import trace_model

PROMPT = "The river runs under a stone"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a checkpoint ``model``, a text, pairs, and a bundle ``out`` calibrated and healed on these."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("encoder-decoder")
    patch.setenv("DYNCOMP_CACHE", own_cache(folder / "cache"))
    write_encoder_decoder(folder / "model")
    write_text(folder / "text.txt", words=3000)
    sentences = prose(600, 5).replace("\n\n\n", " ").split(". ")
    lines = [{"source": a, "target": b} for a, b in itertools.pairwise(sentences)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "all.toml").write_text('passes = "carve-experts{experts=8 shared=2}"\n')
    passes = "carve-experts{experts=8 shared=2}, fit-router{active=0.75}, refit-down, heal{steps=2 batch=4}"
    (folder / "heal.toml").write_text(f'passes = "{passes}"\n')
    patch.chdir(folder)
    dyncomp.convert("model", out="out", recipe="heal.toml", calibrate="pairs.jsonl", other="text.txt", tokens=1024, windows=2, show=False)
    yield folder
    patch.undo()


def cross_entropy(model: Any, row: Tensor) -> Tensor:
    """Loss of each token that is written, by the module itself."""
    read, written = (ids[ids != ABSENT][None] for ids in row)
    with torch.no_grad():
        logits = model(input_ids=read, labels=written).logits  # shifts the labels behind decoder_start_token_id
    return F.cross_entropy(logits[0], written[0], reduction="none")


def test_convert_reports_as_for_decoders(place: Path) -> None:
    report = json.loads((place / "out" / "report.json").read_text())
    assert report["task"] == "seq2seq"
    assert set(report["perplexity"]) >= {"dense", "converted", "static_pruned"}
    text, paired = report["quality"]["other source"], report["quality"]["held out"]
    assert text["window_tokens"] == 63, "of 64, one is what the decoder begins with"
    assert (text["windows"], paired["windows"] > 2) == (2, True), "as many pairs as have the tokens of two windows"
    assert report["healing"]["steps"] == 2
    assert 0.6 < report["active_ffn"] < 1
    assert report["parity"][0]["relative_error"] <= 1e-4
    assert report["parity"][0]["greedy_tokens_equal"] == 1
    assert [e["variant"] for e in report["bench"]] == ["dense", "converted"]
    assert all(e["decode_tokens_per_s"] > 0 and e["prefill_tokens"] == 63 for e in report["bench"])
    opened = open_bundle(place / "out")
    assert opened.manifest.source.decoding == Decoding((1,))
    assert "artifacts/ort/encoder/model.onnx" in opened.manifest.files
    text = run(place, "inspect", "out")
    assert "encoder.block.0" in text
    assert "decoder.block.0" in text


def test_run_writes_what_the_graph_writes(place: Path) -> None:
    options = ["--max-tokens", "12"]
    ort = run(place, "run", "out", "--prompt", PROMPT, *options)
    assert ort == run(place, "run", "out", "--prompt", PROMPT, *options, "--backend", "torch")
    answers = json.loads(run(place, "run", "out", "--prompt", PROMPT, "--prompt", "A stone", "--prompt", PROMPT, *options, "--json"))
    assert [a["text"] + "\n" for a in answers[::2]] == [ort, ort]
    assert answers[0]["prompt_tokens"] > answers[1]["prompt_tokens"] > 1
    assert all(a["kv_cache"] and a["prefill_seconds"] > 0 for a in answers)
    for option in (["--chat"], ["--speculate"], ["--draft", "out"]):
        with pytest.raises(RequestError, match=f"{option[0]}: out holds an encoder–decoder"):
            run(place, "run", "out", "--prompt", PROMPT, *option)


def test_from_python_it_writes_what_transformers_writes(place: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(place / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    options: dict[str, Any] = {"tokens": 512, "windows": 1, "calibrate": "text.txt", "other": None, "backend": "torch"}
    converted = dyncomp.convert("model", recipe="all.toml", show=False, **options)
    ids = model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=16, do_sample=False, num_beams=1)
    assert converted.generate(PROMPT, max_tokens=16) == tokenizer.decode(ids[0, 1:], skip_special_tokens=True)
    assert converted.report["perplexity"]["converted"] == pytest.approx(converted.report["perplexity"]["dense"], rel=1e-5)


def test_perplexity_is_that_of_the_written_tokens(place: Path) -> None:
    model = T5ForConditionalGeneration.from_pretrained(place / "model").eval()
    loaded = load_model(str(place / "model"))
    dense = trace_model(loaded)
    reader = reader_of(loaded, dense)
    for source, whole in (("text.txt", True), ("pairs.jsonl", False)):
        rows = reader.draw(reader.load(str(place / source)), count=3, seed=0).rows
        assert is_pairs(rows)
        assert whole == (len({int((row != ABSENT).sum()) for row in rows}) == 1)
        quality = evaluate({"dense": dense, "converted": dense}, rows, task="seq2seq", batch=4)
        losses = torch.cat([cross_entropy(model, row) for row in rows])
        assert quality.perplexity("dense") == pytest.approx(math.exp(losses.double().mean()), rel=1e-5)
        assert quality.agreement["converted"] == pytest.approx(1)
        assert quality.kl["converted"] < 1e-6
    evaluated = json.loads(run(place, "evaluate", "out", "--text", "pairs.jsonl", "--windows", "3", "--json"))["quality"]["pairs.jsonl"]
    assert evaluated["perplexity"]["dense"] == pytest.approx(quality.perplexity("dense"), rel=1e-5)
    assert evaluated["windows"] == len(rows) > 3, "as many pairs as have the tokens of three windows"


def test_halves_of_windows_follow_each_other(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    text = Corpus("text", ((place / "text.txt").read_text(),))
    stream = tokenizer(text.documents[0], add_special_tokens=False, verbose=False)["input_ids"]
    rows = pairs(text, tokenizer, begin=(1, 7), length=16)
    joined = [row[0, :-1].tolist() + row[1, :14].tolist() for row in rows]
    assert sorted(joined) == sorted(stream[i : i + 29] for i in range(0, 29 * len(rows), 29))
    assert (rows[:, 0, -1] == 0).all(), "what is read ends as the tokenizer ends a text"
    assert (rows[:, 1, 14:] == ABSENT).all()
    assert len(pairs(text, tokenizer, begin=(1,), length=16, tokens=40)) == 3
    assert selection_size(rows, 14) == SELECTION == selection_size(rows[:, 0], 16)


def test_pairs_have_the_special_tokens_of_both_sides(place: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    (row,) = pairs(Pairs("one", (("The river", "Over a stone"),)), tokenizer, begin=(1,))
    assert [row[i][row[i] != ABSENT].tolist() for i in range(2)] == [tokenizer(t)["input_ids"] for t in ("The river", "Over a stone")]
    first = int(row[1, 0])
    (given,) = pairs(Pairs("one", (("The river", "Over a stone"),)), tokenizer, begin=(1, first), length=5)
    assert given[1].tolist()[:3] == [int(row[1, 1]), int(row[1, 2]), 0], "what every text begins with is not written; the rest is cut"


def test_a_text_that_begins_with_several_tokens_is_measured_after_them() -> None:
    graph = trace_tiny("t5_whole")
    graph.info["begin"] = [1, 7]
    rows = torch.stack([tokens(3, 9), torch.cat([tokens(3, 6, seed=1), torch.full((3, 3), ABSENT)], 1)], 1)
    rows[2, 0, 5:] = ABSENT
    assert [len(part) for part in split_rows(rows, 4)] == [2, 1]
    losses = []
    for row in rows:
        given = model_inputs(graph, row[None])
        assert given["decoder_input_ids"][0].tolist() == [1, 7, *row[1, :6].tolist()]
        losses.append(F.cross_entropy(graph(**given)[0, 1:-1], row[1, :6]))
    quality = evaluate({"dense": graph}, rows, task="seq2seq", batch=2)
    assert quality.window_tokens == 6
    assert quality.perplexity("dense") == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


def test_how_a_model_writes_is_what_its_configuration_says() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    loaded = wrap(model, name="tiny", kind="memory", tokenizer=None, causal=False)
    assert (loaded.decoding, loaded.context_length) == (None, 512)
    said = {"decoder_start_token_id": 2, "forced_bos_token_id": 3, "bad_words_ids": [[1], [4, 5]], "begin_suppress_tokens": [6]}
    model.generation_config.update(**said)
    other = wrap(model, name="tiny", kind="memory", tokenizer=None, causal=False)
    assert other.decoding == Decoding((2, 3), (1,), (6,))
    assert other.fingerprint != loaded.fingerprint


def test_damage_and_what_is_missing_are_said(place: Path, tmp_path: Path) -> None:
    (tmp_path / "half.jsonl").write_text('{"source": "a", "target": "b"}\n{"source": "c"}\n')
    with pytest.raises(TextError, match=r'half\.jsonl, line 2: no string under the key "target"'):
        load_pairs(str(tmp_path / "half.jsonl"))
    with pytest.raises(TextError, match="no two pairs"):
        split(Pairs("one", (("a", "b"),)))
    loaded = load_model(str(place / "model"))
    graph = trace_model(loaded)
    with pytest.raises(ModelError, match="the decoding is a dict"):
        describe({"module": loaded.module, "example_inputs": {}, "decoding": {}}, "f", kind="memory", dtype=torch.float32)
    loaded.decoding = None
    with pytest.raises(RequestError, match="does not say which token its texts begin with"):
        reader_of(loaded, graph)
    no_end = graph.copy()
    no_end.info["context_length"] = None
    with pytest.raises(BackendError, match="an encoder–decoder needs a KV cache, and the model's context length is unknown"):
        with_cache(no_end)
    file = place / "out" / "artifacts" / "ort" / "encoder" / "model.onnx"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="was changed since it was written"):
        run(place, "run", "out", "--prompt", PROMPT)
    file.write_bytes(whole)
