"""What ``bench.serving`` measures, on a tiny model, and how docs/results.md shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dyncomp.backends.ort.lower import lower
from dyncomp.backends.ort.run import OrtModel
from test_batching import Modulo, enliven, with_cache

from bench import serving
from bench.tiny import trace_tiny
from dyncomp.report.markdown import SERVING, results_markdown


class Numbers(Modulo):
    """Tokens written as numbers."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(f" {i}" for i in ids)


@pytest.fixture
def model(tmp_path: Path) -> OrtModel:
    graph = trace_tiny("llama")
    enliven(graph.module, 1)
    lower(with_cache(graph, context=96), tmp_path)
    return OrtModel(tmp_path, threads=1)


def test_every_figure_is_measured_and_shown(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "PROMPT", 12)
    monkeypatch.setattr(serving, "ROUNDS", 1)
    tokenizer = Numbers()
    texts, prompts = serving.prompts_of(tokenizer, [[2 + i * j % 50 for i in range(60)] for j in (3, 7)])
    assert len(texts) == serving.REQUESTS
    row: dict[str, Any] = {"precision": "fp32", "threads": 1} | serving.together(model, tokenizer, texts)
    row |= serving.overhead(model, tokenizer, texts)
    row |= {"lookup": serving.speculation(model, tokenizer, prompts, tokens=20)}
    row |= {"drafted": serving.speculation(model, tokenizer, prompts, tokens=20, draft=model)}
    assert row["drafted"]["plain"]["accepted"] == row["drafted"]["plain"]["guessed"] > 0, "a model agrees with itself"
    row |= {"loading": {"file_mib": 10.0, "seconds": 0.5, "loaded_mib": 12.5, "run_mib": 15.0}}
    assert min(row["ratio"], row["whole_ratio"], row["step_seconds"], *row["overhead"].values()) > 0
    assert row["tokens_per_s"] == pytest.approx(row["ratio"] * row["one_tokens_per_s"])
    assert set(row["overhead"]) == set(serving.WAYS)
    assert set(row["lookup"]) == set(row["drafted"]) == {"repetitive", "plain"}
    machine = {"vector": [], "architecture": "none", "cpu": "a cpu", "cores": 1}
    shown = results_markdown({"machine": machine, "versions": {}, "conversions": [], "ffn": [], "serving": [row]})
    head, _, cells = shown.strip().splitlines()[-3:]
    assert head == f"| {' | '.join(SERVING)} |"
    assert cells.startswith("| fp32 | 1 |")
    assert "1.25; 1.50 after a run" in cells
    assert cells.count("|") == len(SERVING) + 1


def test_speculation_that_changes_the_text_is_not_timed(model: OrtModel, monkeypatch: pytest.MonkeyPatch) -> None:
    step = serving.Speculation.step
    monkeypatch.setattr(serving.Speculation, "step", lambda self, ids: -step(self, ids))
    with pytest.raises(AssertionError, match="changed the text"):
        serving.speculation(model, Numbers(), {"plain": "1 2 3"}, tokens=8)
