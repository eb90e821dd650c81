"""``make bench``: measure what docs/results.md shows, and write it. Never edit that file by hand.

    python -m bench.results [--out docs/results.json]

Each conversion runs through the command line in a process of its own; the routed FFN is profiled beside the dense one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.ffn import ffn_times
from dyncomp.bundle import versions
from dyncomp.hardware import detect
from dyncomp.report.markdown import results_markdown

CONVERSIONS = [
    ["smollm2-135m"],
    ["smollm2-135m", "--active", "75%"],
    ["minilm", "--active", "75%"],
]
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results.json")
    parser.add_argument("--only", type=int, nargs="*", help="positions of the conversions to run")
    arguments = parser.parse_args()
    chosen = [c for i, c in enumerate(CONVERSIONS) if arguments.only is None or i in arguments.only]
    results: dict[str, Any] = {"machine": vars(detect()), "versions": versions(), "conversions": [], "ffn": [], "peers": [], "serving": []}
    print("peers", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        peers = Path(folder) / "peers.json"
        for threads in ("2", "1"):
            command = [sys.executable, "-m", "bench.peers", "--threads", threads, "--json", str(peers), "--keep", folder]
            subprocess.run(command, check=True, stdout=sys.stderr)
            results["peers"] += json.loads(peers.read_text())
            write(results, arguments.out)
    print("serving", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "serving.json"
        for threads in ("2", "1"):
            command = [sys.executable, "-m", "bench.serving", "--threads", threads, "--json", str(rows)]
            subprocess.run(command, check=True, stdout=sys.stderr)
            results["serving"] += json.loads(rows.read_text())
            write(results, arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        for number, conversion in enumerate(chosen):
            print("dyncomp convert", *conversion, file=sys.stderr, flush=True)
            command = [sys.executable, "-m", "dyncomp", "convert", *conversion, "-o", f"{folder}/{number}", "--json"]
            report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            for figures in report["quality"].values():
                figures.pop("load_by_region", None)
                figures.pop("active_by_region", None)
                figures.pop("spread_by_region", None)
            results["conversions"].append({"command": " ".join(["dyncomp convert", *conversion])} | report)
            write(results, arguments.out)
    for precision in ("fp32", "int8", "int4"):
        results["ffn"] += ffn_times(precision=precision)
        write(results, arguments.out)


def write(results: dict[str, Any], out: Path) -> None:
    """What there is so far: a later stage that fails must not take hours of measurements with it."""
    out.write_text(json.dumps(results, indent=1) + "\n")
    out.with_suffix(".md").write_text(results_markdown(results))


if __name__ == "__main__":
    main()
