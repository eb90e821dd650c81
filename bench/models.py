"""Measure what docs/models.md shows: what works on which architecture. Never edit that file by hand.

    python -m bench.models [--only TEXT …] [--minutes N] [--again] [--list]

Each row is a tiny random model of :mod:`bench.tiny`, put through the same calls whatever it is. A row is stored in docs/models.json as
soon as it is measured, and rows that are there already are not measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.artifact import first_line
from dyncomp.backends.parity import parity
from dyncomp.passes import CarveExperts
from torch import Tensor

from bench import rowwise
from bench.tiny import ARCHITECTURES, LAYERS, built, sample, tokens
from dyncomp.bundle import versions
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.deploy import backend_of, lower_artifact
from dyncomp.errors import DyncompError
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pipeline, relative_error
from dyncomp.regions import find_regions
from dyncomp.regions.tokens import token_input
from dyncomp.trace import trace

LIMITS = {"trace": 1e-5, "convert": 1e-5, "ORT": 1e-4, "TVM": 1e-4}
"""Largest relative error."""
COLUMNS = ("trace", "regions", "convert", "ORT", "TVM", "generate")
CONTEXT, PROMPT, GENERATED = 64, 12, 8
Cell = dict[str, Any]
"""``text`` where it works, ``reason`` where it does not, or why it works less well than it might; neither where it does not apply."""


class _Empty(Exception):
    """Why there is nothing to show."""


class _Row:
    """One architecture; a step uses what the steps before it made."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder, self.tiny = name, folder, ARCHITECTURES[name]
        self.graph: Graph | None = None
        self.converted: Graph | None = None

    def cells(self) -> dict[str, Cell]:
        steps: dict[str, Callable[[], Cell]] = {
            "trace": self.trace, "regions": self.regions, "convert": self.convert, "ORT": lambda: self.lower("ORT"),
            "TVM": lambda: self.lower("TVM"), "generate": self.generate,
        }  # fmt: skip
        return {column: _tried(steps[column]) for column in COLUMNS}

    def trace(self) -> Cell:
        self.module, self.inputs, self.dims = built(self.name)
        writes = "causal-lm" if list(self.inputs) == ["input_ids"] else "seq2seq"
        info = {"name": self.name, "task": writes if self.tiny.vocab else "other", "context_length": CONTEXT}
        graph = trace(self.module, self.inputs, self.dims, info=info)
        fresh = self._sample(5)
        cell = _held("trace", graph(**fresh), self.module(**fresh))
        self.graph = graph
        return cell

    def regions(self) -> Cell:
        found = find_regions(self._traced)
        mixtures = sum(r.trained for r in found.routed)
        counts = f"{len(found.ffns)} FFN, {len(found.attentions)} attention" + (f", {mixtures} mixtures" if mixtures else "")
        ffns, attentions = max(self.tiny.ffns, LAYERS), max(self.tiny.attentions, LAYERS)
        if len(found.ffns) + mixtures < ffns or len(found.attentions) < attentions:
            raise _Empty(f"{counts} found" + "".join(f"; {r.what}: {r.reason}" for r in found.refusals[:1]))
        return {"text": counts}

    def convert(self) -> Cell:
        dense, graph = self._traced, self._traced.copy()
        regions, fresh = find_regions(graph), self._sample(6)
        if regions.routed and not regions.ffns:
            self.converted = graph
            return _held("convert", graph(**fresh), self.module(**fresh))
        ffns = regions.require_ffns()
        data = [self._sample(seed) for seed in range(4)]
        calibration = Calibration(data, self.name)
        calibrate(graph, ffns, calibration)
        passes = Pipeline([CarveExperts(experts=4, shared=1, keep_dense=())])
        result = passes.run(graph, Context(calibration, data[0], dense=dense))[0].result
        if result.refused:
            raise _Empty(result.refused[0].reason)
        cell = _held("convert", graph(**fresh), dense(**fresh))
        self.converted = graph
        return cell

    def lower(self, column: str) -> Cell:
        """The converted graph, or, so that the reason says how far it gets, the traced one."""
        used = backend_of(column.lower())
        lowered, refused = lower_artifact(self.converted or self._traced, self.folder / used.name, backend=used.name)
        model = used.open(self.folder / used.name, threads=1)
        entry = parity(lowered, model, used.session, backend=used.name, steps=GENERATED, attempts=1)
        if not entry["relative_error"] <= LIMITS[column]:
            raise _Empty(f"differs from PyTorch by {entry['relative_error']:.0e}")
        if self.converted is None:
            raise _Empty(f"nothing was converted; the dense graph runs, relative error {entry['relative_error']:.0e}")
        return {"text": f"{entry['relative_error']:.0e}"} | _notes(refused)

    def generate(self) -> Cell:
        """Greedy tokens of the artifact, beside those of the dense module, computed without a cache."""
        if not self.tiny.vocab:
            return {}
        used = backend_of("ort")
        if not (self.folder / used.name / "config.json").is_file():
            raise _Empty("there is no artifact")
        session = used.session(used.open(self.folder / used.name, threads=1))
        name = self._traced.inputs[token_input(self._traced) or 0].name
        read = {k: v for k, v in sample(self.inputs, self.dims, {"batch": 1, "sequence": PROMPT}, 7).items() if k != name}
        if read:
            session.encode(**{k: v.numpy() for k, v in read.items()})
        ids = tokens(1, PROMPT, seed=7)
        logits, written = session.prefill(ids.numpy(), np.array([PROMPT]), GENERATED), list[int]()
        for _ in range(GENERATED):
            written.append(int(logits[0].argmax()))
            logits = session.step(np.array(written[-1:]))
        for _ in range(GENERATED):
            ids = torch.cat([ids, self.module(**read, **{name: ids})[:, -1:].argmax(-1)], 1)
        expected = ids[0, PROMPT:].tolist()
        if written != expected:
            raise _Empty(f"wrote {written}, PyTorch {expected}")
        return {"text": "✓"} | ({} if session.cached else {"reason": "without a KV cache: every step computes the whole sequence"})

    @property
    def _traced(self) -> Graph:
        if self.graph is None:
            raise _Empty("there is no graph")
        return self.graph

    def _sample(self, seed: int) -> dict[str, Tensor]:
        return sample(self.inputs, self.dims, {"batch": 3, "sequence": 11}, seed)


def _tried(step: Callable[[], Cell]) -> Cell:
    try:
        with torch.no_grad():
            return step()
    except _Empty as error:
        return {"reason": str(error)}
    except DyncompError as error:
        return {"reason": " ".join(error.what.split())}
    except Exception as error:  # whatever it is: a row of the table, not the end of it
        return {"reason": f"{type(error).__name__}: {first_line(error)}"}


def _held(column: str, actual: Any, expected: Any) -> Cell:
    error = relative_error(actual, expected)
    if not error <= LIMITS[column]:
        raise _Empty(f"relative error {error:.0e}")
    return {"text": f"{error:.0e}"}


def _notes(refused: Sequence[Any]) -> Cell:
    return {"reason": f"no KV cache: {refused[0].reason}"} if refused else {}


def measure(name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cells = _Row(name, Path(folder)).cells()
    module = built(name)[0]
    return {"model": type(getattr(module, "model", module)).__name__, "cells": cells, "versions": versions()}


def rows() -> list[str]:
    """Every architecture of the table that has an attention or an FFN at all."""
    return [name for name, tiny in ARCHITECTURES.items() if tiny.blocks]


def filled(cells: Sequence[Cell]) -> tuple[int, int]:
    """(cells that are filled, cells that could be)."""
    apply = [cell for cell in cells if cell]
    return sum("text" in cell for cell in apply), len(apply)


def markdown(results: dict[str, Any]) -> str:
    measured = {name: results["rows"][name] for name in rows() if name in results["rows"]}
    done, all_ = filled([cell for row in measured.values() for cell in row["cells"].values()])
    lines = [
        "# Architectures",
        "",
        "Written by `python -m bench.models`; do not edit. Tiny random models, put through the same calls whatever they are: nothing asks",
        "for a model's name. Numbers are relative errors, the largest absolute difference over the largest absolute value.",
        "",
        f"* *trace*: the graph beside the module, at other sizes than it was traced at (at most {LIMITS['trace']:g}).",
        "* *regions*: every layer's FFN and attention is found; a mixture of experts that was trained counts as an FFN.",
        "* *convert*: every FFN carved into four experts (`carve-experts`), all of them active, beside the dense graph (at most"
        f" {LIMITS['convert']:g}). Trained mixtures become routed FFNs as they are traced; with nothing else to carve, that is held"
        " beside the module.",
        f"* *ORT*, *TVM*: that graph, lowered, beside PyTorch (at most {LIMITS['ORT']:g}); decoders with a KV cache, prompts and steps.",
        f"* *generate*: {GENERATED} greedy tokens of the ONNX Runtime artifact are those of the dense module. Encoders have none (–).",
        "",
        f"{len(measured)} architectures, {done} of {all_} cells filled ({done / max(all_, 1):.0%}). Numbers in brackets: remarks below.",
        "",
        f"| | model | {' | '.join(COLUMNS)} |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    reasons: dict[str, list[str]] = {}
    for name, row in measured.items():
        shown = [_shown(row["cells"][column], reasons, f"{name}, {column}") for column in COLUMNS]
        lines.append(f"| {name} | {row['model']} | " + " | ".join(shown) + " |")
    if reasons:
        lines += ["", "## Remarks", ""]
        lines += [f"{number}. {reason} ({'; '.join(where)})" for number, (reason, where) in enumerate(reasons.items(), 1)]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell, reasons: dict[str, list[str]], where: str) -> str:
    if not cell:
        return "–"
    if "reason" not in cell:
        return str(cell["text"])
    reasons.setdefault(cell["reason"], []).append(where)
    return f"{cell.get('text', '')} [{list(reasons).index(cell['reason']) + 1}]".strip()


def main(arguments: Sequence[str] | None = None) -> None:
    rowwise.main(__doc__, "models.json", {name: name for name in rows()}, measure, markdown, arguments)


if __name__ == "__main__":
    main()
