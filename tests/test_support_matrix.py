"""The command that writes docs/models.md, on two architectures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import models
from bench.models import COLUMNS, filled, main, markdown, measure


def test_rows_are_measured_once_and_empty_cells_have_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "models.json"
    main(["--out", str(out), "--only", "llama"])
    rows = json.loads(out.read_text())["rows"]
    assert list(rows) == ["llama"]
    cells = rows["llama"]["cells"]
    assert [column for column in COLUMNS if "text" in cells[column] and "reason" not in cells[column]] == list(COLUMNS), "works, no remarks"
    assert "| llama | LlamaForCausalLM |" in out.with_suffix(".md").read_text()

    monkeypatch.setattr(models, "measure", lambda name: pytest.fail(f"{name} is there already"))
    main(["--out", str(out), "--only", "llama"])
    assert json.loads(out.read_text())["rows"] == rows


def test_what_fails_is_a_cell_and_not_the_end_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no such operator\n  at line 1")

    monkeypatch.setattr(models.CarveExperts, "run", broken)
    monkeypatch.setattr(models, "lower_artifact", broken)
    row = measure("llama")
    assert "no such operator" in row["cells"]["convert"]["reason"]
    assert row["cells"]["ORT"] == row["cells"]["TVM"] == {"reason": "ValueError: no such operator"}
    assert filled(list(row["cells"].values())) == (2, len(COLUMNS))
    text = markdown({"rows": {"llama": row}})
    assert "2 of 6 cells filled (33%)" in text
    assert "no such operator (llama, ORT; llama, TVM)" in text


def test_a_model_that_computes_something_else_is_no_check_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "relative_error", lambda actual, expected: 2e-5)
    cells = measure("clip_text")["cells"]
    assert cells["trace"] == {"reason": "relative error 2e-05"}
    assert cells["convert"] == {"reason": "there is no graph"}
    assert cells["generate"] == {}, "an encoder does not"
