"""What opening an exported model takes: seconds, and resident memory beside the size of its files, before and after tokens are generated.

    python -m bench.loading [--model smollm2-135m] [--precision fp32 int8 int4]

Each is opened in a process of its own, whose memory before (Python, ONNX Runtime) is not counted; files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def rss() -> float:
    """Resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def opened(folder: Path) -> dict[str, float]:
    """Open an artifact in this process and generate eight tokens with it."""
    import onnxruntime  # noqa: F401  not counted
    from dyncomp.backends.ort.decoder import decoder_for
    from dyncomp.backends.ort.run import OrtModel

    before, start = rss(), time.perf_counter()
    decoder = decoder_for(OrtModel(folder))
    seconds, loaded = time.perf_counter() - start, rss()
    decoder.prefill(np.ones((1, 16), np.int64), np.array([16]), 8)
    for _ in range(8):
        decoder.step(np.array([5]))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20
    return {"file_mib": size, "seconds": seconds, "loaded_mib": loaded - before, "run_mib": rss() - before}


def measured(folder: Path) -> dict[str, float]:
    """What :func:`opened` finds in a process of its own, the second to read the files."""
    command = [sys.executable, "-m", "bench.loading", "--open", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open is not None:
        print(json.dumps(opened(given.open)))
        return
    from dyncomp.passes import Quantize

    from dyncomp.deploy import dense_artifact
    from dyncomp.models import load_model
    from dyncomp.trace import trace_model

    loaded = load_model(given.model)
    dense = trace_model(loaded)
    print("precision  file MiB  load s  resident MiB: loaded        after a run")
    for precision in given.precision:
        quantize = None if precision == "fp32" else Quantize(bits=int(precision.removeprefix("int")))
        folder = dense_artifact(dense, loaded.fingerprint, quantize=quantize)
        found = measured(folder)
        shares = [f"{found[k]:6.0f} ({found[k] / found['file_mib']:.2f} x file)" for k in ("loaded_mib", "run_mib")]
        print(f"{precision:9} {found['file_mib']:9.0f} {found['seconds']:7.2f} {'  '.join(shares):>46}", flush=True)


if __name__ == "__main__":
    main()
