"""Measure what docs/exports.md shows: checkpoints and GGUF files of a real model, beside the graph they were written from.

    python -m bench.exports [--only TEXT …] [--minutes N] [--again] [--list]

Each row converts SmolLM2-135M in a process of its own, exports it, loads what was written with the stock class of transformers or with
llama.cpp, lets that write 64 tokens greedily and compares the logits of both along the text. A row is stored in docs/exports.json as soon
as it is measured, and rows that are there already are not measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyncomp.backends.gguf.write import NAMES

from bench import rowwise
from bench.memory import alone
from dyncomp.bundle import versions
from dyncomp.convert import ConvertRequest, convert
from dyncomp.errors import DyncompError
from dyncomp.export import ExportRequest, export

TOKENS, WINDOWS = 16_384, 1


@dataclass(frozen=True)
class Row:
    """A recipe, and what its model is written as: ``hf`` in an architecture, or ``gguf``."""

    recipe: str
    backend: str
    architecture: str


def rows() -> dict[str, Row]:
    written = {
        "granite-moe": ("granite-moe", "qwen2-moe"), "qwen-moe": ("qwen2-moe",),
        "mixtral-8x2:upcycled": ("mixtral", "granite-moe"), "deepseek-v3:upcycled": ("glm4-moe",), "ds-moe:carved": ("qwen2-moe",),
    }  # fmt: skip
    every = [Row(r, way, name) for r, names in written.items() for name in names for way in ("hf", "gguf") if way == "hf" or name in NAMES]
    return {f"{r.recipe} {r.backend} {r.architecture}": r for r in every}


def measure(row: Row) -> dict[str, Any]:
    return {"versions": versions()} | alone(_export, row)


def _export(row: Row) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="exports-") as folder:
        bundle, out = Path(folder) / "bundle", Path(folder) / "out"
        request = ConvertRequest(
            model="smollm2-135m", out=bundle, recipe=row.recipe, tokens=TOKENS, windows=WINDOWS, other=None, backend="torch"
        )
        convert(request)
        try:
            record = export(ExportRequest(bundle, out, backend=row.backend, architecture=row.architecture))
        except DyncompError as error:
            return {"refused": str(error).splitlines()[0]}
        return {key: record[key] for key in ("architecture", "check") if key in record}


_TEXT = f"""
# Checkpoints and GGUF files

Written by `python -m bench.exports`; do not edit. SmolLM2-135M, calibrated on {TOKENS} tokens, nothing healed, exported in float32 and
loaded by the stock class of transformers (every key there, none unexpected) or by llama.cpp. That writes 64 tokens greedily; *same* is how
many of them in a row, from the first, dyncomp's graph would have written too. Errors are the largest difference of a position's logits over
the largest logit: at the worst position, and the median. *Other experts* is at how many positions some layer ran others than in the graph.

A row that the command knows and that is not here was not measured yet (`python -m bench.exports --list`).

| recipe | written as | read by | worst error | median error | other experts | same |
|---|---|---|---|---|---|---|
"""


def markdown(results: dict[str, Any]) -> str:
    return _TEXT.lstrip() + "".join(_line(row, results["rows"][key]) + "\n" for key, row in rows().items() if key in results["rows"])


def _line(row: Row, found: dict[str, Any]) -> str:
    cells = [f"`{row.recipe}`", row.architecture + (", GGUF" if row.backend == "gguf" else "")]
    check = found.get("check")
    if check is None:
        return f"| {' | '.join([*cells, found.get('refused', 'not run'), '', '', '', ''])} |"
    other = f"{check['other_experts']} of {check['positions']}" if "other_experts" in check else ""
    same = f"{check['greedy_equal']} of {check['greedy_tokens']}"
    errors = [f"{check[name]:.1e}" for name in ("relative_error", "median_error")]
    return f"| {' | '.join([*cells, check['class'], *errors, other, same])} |"


def main(arguments: Sequence[str] | None = None) -> None:
    rowwise.main(__doc__, "exports.json", rows(), measure, markdown, arguments)


if __name__ == "__main__":
    main()
