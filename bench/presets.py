"""Measure what docs/presets.md shows: what each preset makes of a real model before any healing. Never edit that file by hand.

    python -m bench.presets [--only TEXT …] [--minutes N] [--again] [--list]

Each row converts SmolLM2-135M (soft-moe: all-MiniLM-L6-v2) in a process of its own with ONNX Runtime as the backend, and tries to export
it as a checkpoint of a stock architecture. A row is stored in docs/presets.json as soon as it is measured, and rows that are there already
are not measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import rowwise
from bench.memory import alone
from dyncomp.bundle import versions
from dyncomp.convert import ConvertRequest, convert
from dyncomp.errors import BackendError, PassError
from dyncomp.export import ExportRequest, export
from dyncomp.recipe import MADE, RECIPES
from dyncomp.report.tables import between

TOKENS, WINDOWS = 16_384, 4
ENCODERS = {"soft-moe": "minilm"}
"""Presets that decoders refuse, and what they are tried on."""


def rows() -> dict[str, str]:
    """Preset -> model; what makes the smallest models first."""
    both = [name for name, recipe in RECIPES.items() if recipe.otherwise]
    names = ["soft-moe", *(f"{name}:carved" for name in both), "mod-12.5", *(f"{name}:{MADE[1]}" for name in both)]
    return {name: name for name in names}


def measure(preset: str) -> dict[str, Any]:
    return {"versions": versions()} | alone(_convert, preset)


def _convert(preset: str) -> dict[str, Any]:
    model = ENCODERS.get(preset, "smollm2-135m")
    with tempfile.TemporaryDirectory(prefix="presets-") as folder:
        out = Path(folder) / "out"
        report = convert(ConvertRequest(model=model, out=out, recipe=preset, tokens=TOKENS, windows=WINDOWS, other=None, low_memory=True))
        kept = {key: report[key] for key in ("passes", "task", "parameters", "active_parameters", "cpu_seconds", "peak_rss_bytes")}
        quality = {k: v for k, v in report["quality"]["held out"].items() if not k.endswith(("_by_region", "_by_gate"))}
        parity = {key: report["parity"][0].get(key) for key in ("relative_error", "greedy_tokens_equal")}
        dense = {key: report["dense"][key] for key in ("parameters", "active_parameters")}
        return kept | {"model": model, "quality": quality, "dense": dense, "parity": parity, "export": _export(out, Path(folder) / "hf")}


def _export(bundle: Path, out: Path) -> dict[str, Any]:
    """The architecture and how far its stock class is from the graph, or why there is none."""
    try:
        record = export(ExportRequest(bundle, out))
    except BackendError as error:  # no architecture holds it: each line says why one does not
        reasons = [line.strip() for line in str(error).splitlines() if ": " in line and "holds this model" not in line]
        return {"refused": reasons[0].partition(": ")[2]}
    except PassError as error:  # one does, and computes something else
        return {"refused": str(error).splitlines()[0]}
    return {"architecture": record["architecture"], "median_error": record["check"]["median_error"]}


_TEXT = f"""
# Presets

Written by `python -m bench.presets`; do not edit. SmolLM2-135M (soft-moe: all-MiniLM-L6-v2), calibrated on {TOKENS} tokens and measured on
{WINDOWS} windows of 512 held-out tokens, nothing healed. *Carved* experts are parts of each FFN, *upcycled* ones copies of it, or of its
parts, with noise (1 % of the weights): these begin as the dense model and are what `dyncomp heal` trains. In brackets 95 % intervals.
*Active* is what a token computes, beside all parameters. *Parity* is the largest difference of ONNX Runtime's logits from the graph's,
over the largest value, and the share of greedy tokens that are the same. CPU minutes and peak memory are those of the whole conversion
with `--low-memory`, baselines and timing included; pages of mapped files count as memory.

A row that the command knows and that is not here was not measured yet (`python -m bench.presets --list`).

| preset | loss | static pruning | active FFN | parameters, M | active, M | CPU minutes | GiB | parity | export |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(results: dict[str, Any]) -> str:
    lines = [_line(key, results["rows"][key]) for key in rows() if key in results["rows"]]
    return _TEXT.lstrip() + "\n".join(lines) + "\n"


def _line(preset: str, found: dict[str, Any]) -> str:
    quality, parity, exported = found["quality"], found["parity"], found["export"]
    same = "" if parity["greedy_tokens_equal"] is None else f", {parity['greedy_tokens_equal']:.0%}"
    dense = found["dense"]
    share = quality.get("active_ffn")
    cells = [
        preset, _loss(quality, "converted"), _loss(quality, "static_pruned"), "" if share is None else f"{share:.1%}",
        f"{found['parameters'] / 1e6:.0f} of {dense['parameters'] / 1e6:.0f}", f"{found['active_parameters'] / 1e6:.0f}",
        f"{found['cpu_seconds'] / 60:.1f}", f"{found['peak_rss_bytes'] / 2**30:.1f}", f"{parity['relative_error']:.1e}{same}",
        exported.get("refused") or f"{exported['architecture']}, median error {exported['median_error']:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _loss(quality: dict[str, Any], model: str) -> str:
    if "increase" in quality:
        if model not in quality["increase"]:
            return ""
        ends = quality["intervals"].get("increase", {}).get(model)
        return f"perplexity {quality['increase'][model]:+.1%}{between(ends, '+.1%')}"
    if model not in quality["cosine"]:
        return ""
    return f"cosine {quality['cosine'][model]:.3f}{between(quality['intervals'].get('cosine', {}).get(model), '.3f')}"


def main(arguments: Sequence[str] | None = None) -> None:
    rowwise.main(__doc__, "presets.json", rows(), measure, markdown, arguments)


if __name__ == "__main__":
    main()
