"""``make bench``: measure what docs/results.md shows, and write it. Never edit that file by hand.

    python -m bench.results [--out docs/results.json] [--only NAME …]

Each conversion runs through the command line in a process of its own; those of SmolLM2 then take turns with the dense model and other
engines in one process (``bench.peers``), and the routed FFN with the dense one (``bench.ffn``).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.peers import gains
from dyncomp.bundle import versions
from dyncomp.hardware import detect
from dyncomp.report.markdown import results_markdown

CONVERSIONS = {
    "within 1%": ["smollm2-135m"],
    "within 20%": ["smollm2-135m", "--max-loss", "20%"],
    "experts": ["smollm2-135m", "--active", "75%"],
    "minilm": ["minilm", "--active", "75%"],
}
"""Name of the bundle -> what converts it; those of SmolLM2 are measured beside other engines."""
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.json")
    parser.add_argument("--only", nargs="*", default=list(CONVERSIONS), choices=CONVERSIONS, help="conversions to run")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": vars(detect()), "versions": versions()}
    results |= {part: [] for part in ("conversions", "peers", "gains", "serving", "ffn")}
    with tempfile.TemporaryDirectory() as folder:
        bundles = []
        for name in arguments.only:
            out, conversion = f"{folder}/{name}", ["dyncomp", "convert", *CONVERSIONS[name]]
            print(*conversion, file=sys.stderr, flush=True)
            command = [sys.executable, "-m", *conversion, "-o", out, "--json"]
            report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for figures in report["quality"].values():
                figures.pop("load_by_region", None)
                figures.pop("active_by_region", None)
                figures.pop("spread_by_region", None)
            results["conversions"].append({"command": " ".join(conversion)} | report)
            if CONVERSIONS[name][0] == "smollm2-135m":
                bundles.append(out)
            write(results, arguments.out)
        beside = ["--bundles", *bundles] if bundles else []
        for threads in ("2", "1"):
            rows = _measured("bench.peers", "--threads", threads, "--keep", f"{folder}/peers", *beside)
            results["peers"] += rows
            results["gains"] += gains(rows)
            write(results, arguments.out)
    for threads in ("2", "1"):
        results["serving"] += _measured("bench.serving", "--threads", threads)
        write(results, arguments.out)
    results["ffn"] = _measured("bench.ffn", "--precision", "fp32", "int8", "int4", "--shape", "smollm2-135m", "2048x8192")
    write(results, arguments.out)


def _measured(module: str, *arguments: str) -> list[dict[str, Any]]:
    """Rows that a benchmark in a process of its own writes to ``--json``."""
    print(module, *arguments, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        subprocess.run([sys.executable, "-m", module, *arguments, "--json", str(file)], check=True, stdout=sys.stderr)
        rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def write(results: dict[str, Any], out: Path) -> None:
    """What there is so far: a later stage that fails must not take hours of measurements with it."""
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(results_markdown(results))


if __name__ == "__main__":
    main()
