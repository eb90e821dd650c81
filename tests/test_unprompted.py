"""Text that a model writes of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dyncomp.backends.recompute import Array
from helpers import own_cache
from test_cli import refused, run
from test_text import refused as refused_text
from tiny_checkpoint import write_checkpoint
from transformers import AutoTokenizer

from dyncomp import deploy
from dyncomp.deploy import generated_text
from dyncomp.models import load_model
from dyncomp.runtime.batching import Batcher
from dyncomp.runtime.unprompted import SHORTEST, write_documents
from dyncomp.trace import trace_model


class Chain:
    """Slots of a model that writes one of two tokens after each, by a third and two thirds; ``end`` ends texts at once."""

    engine, threads = "test", 1

    def __init__(self, vocabulary: int, *, end: int | None = None) -> None:
        self.vocabulary, self.end, self.slots, self.capacity, self.lengths = vocabulary, end, 4, 64, np.zeros(4, np.int64)

    def extend(self, slot: int, ids: Array) -> Array:
        self.lengths[slot] += len(ids)
        return self.after(ids[-1:])[0]

    def step(self, ids: Array) -> Array:
        self.lengths[: len(ids)] += 1
        return self.after(ids)

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.lengths[target] = tokens

    def after(self, ids: Array) -> Array:
        logits = np.full((len(ids), self.vocabulary), -np.inf, np.float32)
        for row, token in zip(logits, ids, strict=True):
            row[[1 + token % (self.vocabulary - 1), 1 + (token + 1) % (self.vocabulary - 1)]] = np.log([1 / 3, 2 / 3])
            if self.end is not None:
                row[self.end] = 20.0
        return logits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("unprompted") / "model")


def test_documents_depend_on_the_seed_and_begin_anywhere(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def write(seed: int) -> list[str]:
        return write_documents(Batcher(Chain(len(tokenizer)), tokenizer), tokens=3000, length=64, seed=seed)

    documents = write(1)
    assert 47 <= len(documents) <= 60
    assert len(set(documents)) > 40
    assert len({d[0] for d in documents}) > 10
    assert write(1) == documents
    assert write(2) != documents


def test_a_model_that_ends_at_once_is_named(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    batcher = Batcher(Chain(len(tokenizer), end=tokenizer.eos_token_id), tokenizer)
    refused_text(lambda: write_documents(batcher, tokens=200, length=64), "ends its texts at once", "0 tokens", "give a text")
    assert SHORTEST > 1


def test_a_model_is_converted_without_a_text(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNCOMP_CACHE", own_cache(tmp_path / "cache"))
    common = ["--tokens", "1024", "--windows", "2", "--experts", "8", "--active", "75%", "--backend", "torch"]
    run(tmp_path, "convert", str(model), "-o", "out", *common, "--calibrate", "generated")
    (kept,) = (tmp_path / "cache" / "generated").iterdir()
    loaded = load_model(str(model))
    size = int(1.25 * 1024) + 2 * 128
    monkeypatch.setattr(deploy, "dense_artifact", None)  # what was written is not written again
    corpus = generated_text(trace_model(loaded), loaded, tokens=size, length=128, seed=0)
    assert corpus.name == "generated"
    assert len(kept.read_text().splitlines()) == len(corpus.documents) > 5
    assert "generated" in refused(tmp_path, "evaluate", "out", "--text", "generated")
