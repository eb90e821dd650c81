"""Models that hear: WAV files, recordings, spoken text, word errors, and a tiny Whisper through every command."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import own_cache
from hypothesis import given
from hypothesis import strategies as st
from scipy.io import wavfile
from test_cli import run
from tiny_checkpoint import prose, write_text, write_whisper
from torch import Tensor
from transformers import WhisperFeatureExtractor

import dyncomp
from dyncomp import espeak, sound
from dyncomp.bundle import open_bundle
from dyncomp.errors import MissingExtraError, ModelError, RequestError, SoundError
from dyncomp.evidence import measure_quality
from dyncomp.examples import encoder_tokens, reader_of
from dyncomp.models import load_model, load_processor
from dyncomp.models.loaded import Decoding
from dyncomp.rows import ABSENT
from dyncomp.text import Corpus
from dyncomp.trace import trace_model
from dyncomp.transcribe import transcribe
from dyncomp.wav import read_wav, resample
from dyncomp.wer import word_errors, words

BEGIN = (320, 321)


def noise(seconds: float, rate: int, seed: int = 0) -> Any:
    """Samples of one channel: tones that come and go."""
    random, at = np.random.default_rng(seed), np.arange(int(seconds * rate)) / rate
    tones = [np.sin(2 * np.pi * f * at) * np.sin(np.pi * at * g) for f, g in random.uniform((100, 1), (3000, 9), (3, 2))]
    return (np.sum(tones, 0) / 4).astype(np.float32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """In the working folder a checkpoint ``model``, recordings in ``said``, and a bundle ``out`` calibrated and healed on these."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("speech")
    patch.setenv("DYNCOMP_CACHE", own_cache(folder / "cache"))
    write_whisper(folder / "model")
    (folder / "said").mkdir()
    for index, sentence in enumerate(prose(100).replace("\n\n\n", " ").split(". ")):
        rate = (16_000, 22_050)[index % 2]
        wavfile.write(folder / "said" / f"{index}.wav", rate, noise(0.3 + index / 40, rate, index))
        (folder / "said" / f"{index}.txt").write_text(sentence)
    passes = "carve-experts{experts=8 shared=2}, fit-router{active=0.75}, refit-down, heal{steps=2 batch=4}"
    (folder / "heal.toml").write_text(f'passes = "{passes}"\n')
    patch.chdir(folder)
    yield dyncomp.convert("model", out="out", recipe="heal.toml", calibrate="said", other=None, tokens=1024, windows=3, show=False)
    patch.undo()


@pytest.fixture
def place(converted: Any) -> Path:
    return Path.cwd()


def written_by_transformers(model: Any, tokenizer: Any, heard: Tensor, tokens: int) -> str:
    ids = model.generate(
        input_features=heard[None], decoder_input_ids=torch.tensor([BEGIN]), max_new_tokens=tokens, do_sample=False, num_beams=1
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def test_convert_reports_word_errors_beside_perplexity(place: Path) -> None:
    report = json.loads((place / "out" / "report.json").read_text())
    figures = report["quality"]["held out"]
    assert report["task"] == "seq2seq"
    assert set(figures["wer"]) == set(figures["perplexity"]) - {"windows", "window_tokens"} >= {"dense", "converted", "static_pruned"}
    assert set(figures["intervals"]["wer_change"]) == set(figures["wer"]) - {"dense"}
    assert report["healing"]["steps"] == 2
    assert 0.6 < report["active_ffn"] < 1
    assert report["parity"][0]["relative_error"] <= 1e-4
    assert report["parity"][0]["greedy_tokens_equal"] == 1
    assert all(e["recordings_per_s"] > 0 and e["decode_tokens_per_s"] > 0 for e in report["bench"])
    assert report["flops_unit"] == "recording and 64 written tokens"
    assert "word errors" in run(place, "inspect", "out")


def test_run_writes_what_the_graph_writes(place: Path, converted: Any) -> None:
    files = ["said/0.wav", "said/1.wav"]
    options = ["--max-tokens", "12"]
    ort = run(place, "run", "out", "--audio", files[0], *options)
    assert ort == run(place, "run", "out", "--audio", files[0], *options, "--backend", "torch")
    answers = json.loads(run(place, "run", "out", "--audio", files[0], "--audio", files[1], *options, "--json"))
    assert [a["kv_cache"] for a in answers] == [True, True]
    texts = [a["text"].strip() for a in answers]
    assert texts[0] == ort.strip() != texts[1]
    assert converted.transcribe(files[0], read_wav(Path(files[1])), max_tokens=12) == texts


def test_figures_are_of_the_transcripts(place: Path) -> None:
    """Perplexity is that of the module itself, and where the transcripts are what the dense model writes, it makes no errors."""
    loaded = load_model(str(place / "model"))
    dense = trace_model(loaded)
    drawn = reader_of(loaded, dense).draw(sound.load_sound("said"), count=3, seed=0)
    rows: Any = drawn.rows
    model: Any = loaded.module.model
    losses = []
    for heard, written in zip(rows.features, rows.written, strict=True):
        ids = written[written != ABSENT]
        with torch.no_grad():
            logits = model(heard[None], decoder_input_ids=torch.tensor([[*BEGIN, *ids[:-1]]])).logits[0, 1:]
        losses.append(F.cross_entropy(logits, ids, reduction="none"))
    texts = transcribe(dense, rows, loaded)
    assert texts == [written_by_transformers(model, loaded.tokenizer, heard, 2 * rows.written.shape[1]) for heard in rows.features]
    own = dataclasses.replace(drawn, said=tuple(texts))
    models = {"dense": dense, "converted": open_bundle("out").graph()}
    quality = measure_quality(models, {"said": drawn, "own": own}, "seq2seq", loaded=loaded)
    assert quality["said"]["perplexity"]["dense"] == pytest.approx(math.exp(torch.cat(losses).double().mean()), rel=1e-5)
    assert quality["own"]["wer"]["dense"] == 0 < quality["said"]["wer"]["dense"]
    evaluated = json.loads(run(place, "evaluate", "out", "--audio", "said", "--windows", "3", "--json"))["quality"]["said"]
    assert evaluated["wer"] == pytest.approx(quality["said"]["wer"])
    assert evaluated["perplexity"] == pytest.approx(quality["said"]["perplexity"], rel=1e-5)


def test_a_model_that_hears_is_read_with_its_processor(place: Path, tmp_path: Path) -> None:
    loaded = load_model(str(place / "model"))
    graph = trace_model(loaded)
    assert loaded.decoding == Decoding(BEGIN, BEGIN, (0,))
    assert encoder_tokens(graph) == 50
    drawn = reader_of(loaded, graph).draw(sound.load_sound(str(place / "said")), count=3, seed=0)
    rows: Any = drawn.rows
    assert list(rows.features.shape) == [3, 8, 100]
    tokenizer: Any = loaded.tokenizer
    for row, said in zip(rows.written, drawn.said, strict=True):
        assert tokenizer.decode(row[row >= 0]) == f" {said}<eos>"
    loaded.processor = None
    with pytest.raises(RequestError, match="came without a feature extractor"):
        reader_of(loaded, graph)
    shutil.copytree(place / "model", tmp_path / "other")
    file = tmp_path / "other" / "preprocessor_config.json"
    file.write_text(file.read_text().replace('"feature_size": 8', '"feature_size": 16'))
    (tmp_path / "both").mkdir()  # what a processor with a tokenizer saves
    (tmp_path / "both" / "processor_config.json").write_text(json.dumps({"feature_extractor": json.loads(file.read_text())}))
    assert load_processor(tmp_path / "both").feature_size == 16
    with pytest.raises(ModelError, match=r"its feature extractor makes mel bins and frames \[16, 100\], its encoder takes \[8, 100\]"):
        load_model(str(tmp_path / "other"))


def test_collections_are_divided_by_what_they_hold(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "said", tmp_path / "twice")
    for suffix in (".wav", ".txt"):
        shutil.copy(tmp_path / "twice" / f"0{suffix}", tmp_path / "twice" / f"again{suffix}")
    once, twice = (sound.load_sound(str(folder)) for folder in (place / "said", tmp_path / "twice"))
    parts = sound.split(twice)
    assert sum(len(part.documents) for part in parts) == len(once.documents) == len(twice.documents) - 1
    assert not set(parts[0].documents) & set(parts[1].documents)
    with pytest.raises(SoundError, match="no two recordings"):
        sound.split(sound.Recordings("one", twice.documents[:1]))


def test_passages_are_spoken_that_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = sound.load_sound(str(write_text(place / "text.txt", words=300)))
    assert isinstance(corpus, Corpus)
    spoken: list[str] = []

    def speak(texts: Any) -> Any:
        spoken.extend(text for _, text in texts)
        return [noise(0.5, 16_000, i) for i, _ in enumerate(texts)], 16_000

    monkeypatch.setattr(sound, "speak", speak)
    processor = load_model(str(place / "model")).processor
    features, said = sound.heard(corpus, processor, count=4)
    assert list(features.shape) == [4, 8, 100]
    assert list(said) == spoken
    assert sound.speakable(Corpus("a", ("It is 5 o'clock at the door now. The old river runs under the stone.",))).documents == (
        "The old river runs under the stone.",
    )
    with pytest.raises(SoundError, match="no sentence of 5 to 20 words"):
        sound.speakable(Corpus("b", ("1 2 3.",)))


def test_espeak_says_the_same_in_the_same_way() -> None:
    if importlib.util.find_spec("espeakng_loader") is None:
        with pytest.raises(MissingExtraError, match=r"espeakng-loader==0\.2\.4"):
            espeak.speak([("en-us", "a")])
        pytest.skip("espeakng-loader is not installed: requirements-data.txt")
    (first, _), rate = espeak.speak([("en-us", "The old river."), ("en-us+f3", "The old river runs.")])
    (again,), _ = espeak.speak([("en-us", "The old river.")])
    assert np.array_equal(first, again)
    assert 0.5 < len(first) / rate < 3
    with pytest.raises(SoundError, match="no voice 'xx-none'"):
        espeak.speak([("xx-none", "a")])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "0.wav").write_bytes(b"OggS" + bytes(60)), "0.wav is not a WAV file"),
        (lambda f: (f / "0.wav").write_bytes((f / "0.wav").read_bytes()[:-100]), r"0.wav is truncated: it has \d+ of \d+ bytes"),
        (lambda f: wavfile.write(f / "0.wav", 16_000, np.zeros(0, np.int16)), "0.wav holds no samples"),
        (lambda f: wavfile.write(f / "0.wav", 10, np.zeros(9, np.int16)), "0.wav is damaged: 10 samples a second"),
        (lambda f: wavfile.write(f / "0.wav", 16_000, np.full(9, np.nan, np.float32)), "holds samples that are no numbers"),
        (lambda f: wavfile.write(f / "0.wav", 16_000, np.zeros(16_001, np.int16)), r"0.wav lasts 1.0 s, and the model hears 1 s at a time"),
        (lambda f: (f / "0.txt").unlink(), "0.wav has no transcript: there is no 0.txt beside it"),
        (lambda f: (f / "0.txt").write_text(" …\n"), "0.txt says no word of what 0.wav holds"),
        (lambda f: [p.unlink() for p in f.glob("*.wav")], "holds no .wav file"),
        (lambda f: (f / "a.jsonl").write_text('{"audio": "no.wav", "text": "a"}'), r"no.wav cannot be read: No such file"),
        (lambda f: (f / "a.jsonl").write_text('{"audio": "0.wav", "text": 1}'), 'line 1: no string under the key "text"'),
    ],
)  # fmt: skip
def test_unsuitable_recordings_are_refused(place: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    for name in ("0.wav", "0.txt"):
        shutil.copy(place / "said" / name, folder)
    change(folder)
    source = next(iter(folder.glob("*.jsonl")), folder)
    processor = load_processor(place / "model")
    with pytest.raises(SoundError, match=message):
        sound.heard(sound.load_sound(str(source)), processor)


def test_what_a_model_does_not_take_is_refused(place: Path) -> None:
    for arguments, message in (
        (["--prompt", "a"], "holds a model that hears, and does not read text"),
        (["--image", "a.png"], "takes no images"),
        (["--audio", "said/0.wav", "--prompt", "a"], "--audio for transcripts"),
        (["--audio", "said/0.wav", "--speculate"], "--speculate: out holds an encoder–decoder"),
        (["--audio", "model/config.json"], "is not a WAV file"),
    ):
        with pytest.raises(RequestError, match=message):
            run(place, "run", "out", *arguments)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_samples_are_read_at_full_scale(kind: Any, tmp_path: Path) -> None:
    expected = noise(0.01, 8000)
    scale = 1 if np.dtype(kind).kind == "f" else float(np.iinfo(kind).max - np.iinfo(kind).min + 1) / 2
    values = (expected.astype(np.float64) * scale + (128 if kind is np.uint8 else 0)).astype(kind)
    wavfile.write(tmp_path / "a.wav", 8000, np.stack([values, values], 1))
    found, rate = read_wav(tmp_path / "a.wav")
    assert (found.dtype, rate) == (np.float32, 8000)
    assert np.abs(found - expected).max() <= 1 / scale + 1e-6


def test_another_rate_is_the_same_sound() -> None:
    at = np.arange(22_050) / 22_050
    low, high = (np.sin(2 * np.pi * f * at).astype(np.float32) for f in (440, 10_000))
    processor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    first, second = (sound.features(processor, noise(0.5, rate), rate, name="a") for rate in (16_000, 22_050))
    assert float((first - second).abs().mean()) < 0.01
    expected = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    found = resample(low + high, 22_050, 16_000)  # of the two, 16 kHz hold the first only
    assert np.abs(found - expected)[400:-400].max() < 0.02


@pytest.mark.parametrize(
    ("said", "written", "errors"),
    [("The cat sat.", "the CAT, sat", 0), ("a b c", "a x c", 1), ("a b c", "a c", 1), ("a c", "a b c d", 2), ("a b", "", 2), ("", "", 0)],
)
def test_word_errors_are_counted(said: str, written: str, errors: int) -> None:
    assert word_errors(said, written) == errors


def test_words_are_compared_without_punctuation() -> None:
    assert words("It’s a well-known 'fact' – 42!") == ["it's", "a", "well", "known", "fact", "42"]


SENTENCE = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)


@given(SENTENCE, SENTENCE, SENTENCE)
def test_word_errors_are_a_distance(a: str, b: str, c: str) -> None:
    assert word_errors(a, b) == word_errors(b, a)
    assert (word_errors(a, b) == 0) == (a == b)
    assert word_errors(a, c) <= word_errors(a, b) + word_errors(b, c)
    assert word_errors(a, b) >= abs(len(re.findall(r"\w", a)) - len(re.findall(r"\w", b)))
