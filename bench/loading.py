"""What opening an exported model takes: seconds, and resident memory beside the size of its files, before and after tokens are generated.

    python -m bench.loading [--backend ort|tvm] [--model smollm2-135m] [--precision fp32 int8 int4]

Each is opened in a process of its own, whose memory before (Python, the runtime) is not counted; files are in the page cache. ``load`` is
the opening alone, ``from start`` what has passed since the process was started, imports and all, in time and in CPU time. ``compile`` is
what lowering the traced and quantized graph took, the import of the compiler in the first row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def rss() -> float:
    """Resident memory of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def opened(folder: Path, backend: str, started: float) -> dict[str, float]:
    """Open an artifact in this process and generate eight tokens with it.

    Args:
        started: when the process was, in seconds of the system's clock.
    """
    open_model: Any
    decoder_of: Any
    if backend == "tvm":
        from dyncomp.backends.tvm import decoder as tvm_decoder
        from dyncomp.backends.tvm import run as tvm_run

        tvm_run.load_runtime()  # not counted
        open_model, decoder_of = tvm_run.TvmModel, tvm_decoder.decoder_for
    else:
        import onnxruntime  # noqa: F401  not counted
        from dyncomp.backends.ort import decoder as ort_decoder
        from dyncomp.backends.ort import run as ort_run

        open_model, decoder_of = ort_run.OrtModel, ort_decoder.decoder_for

    before, start = rss(), time.perf_counter()
    decoder = decoder_of(open_model(folder))
    seconds, loaded, since, cpu = time.perf_counter() - start, rss(), time.time() - started, time.process_time()
    decoder.prefill(np.ones((1, 16), np.int64), np.array([16]), 8)
    for _ in range(8):
        decoder.step(np.array([5]))
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20
    figures = {"file_mib": size, "seconds": seconds, "from_start": since, "cpu": cpu}
    return figures | {"loaded_mib": loaded - before, "run_mib": rss() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="ort", choices=("ort", "tvm"))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.open is not None:
        print(json.dumps(opened(given.open, given.backend, given.started)))
        return
    from dyncomp.passes import Quantize

    from dyncomp.deploy import backend_of, lower_artifact
    from dyncomp.models import load_model
    from dyncomp.pipeline import Context
    from dyncomp.trace import trace_model

    dense = trace_model(load_model(given.model))
    print(backend_of(given.backend).label)
    print("precision  compile s  file MiB  load s  from start s (CPU)  resident MiB: loaded        after a run")
    for precision in given.precision:
        graph = dense.copy()
        if precision != "fp32":
            Quantize(bits=int(precision.removeprefix("int"))).run(graph, Context())
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            lower_artifact(graph, Path(folder), backend=given.backend)
            seconds = time.perf_counter() - start
            found = measured(Path(folder), given.backend)
        shares = [f"{found[k]:6.0f} ({found[k] / found['file_mib']:.2f} x file)" for k in ("loaded_mib", "run_mib")]
        times = f"{found['seconds']:7.2f} {found['from_start']:13.2f} ({found['cpu']:.2f})"
        print(f"{precision:9} {seconds:10.1f} {found['file_mib']:9.0f} {times} {'  '.join(shares):>46}", flush=True)


def measured(folder: Path, backend: str = "ort") -> dict[str, float]:
    """The figures of the second process that opens it: the first has read the files."""
    for _ in range(2):
        started = str(time.time())
        command = [sys.executable, "-m", "bench.loading", "--backend", backend, "--open", str(folder), "--started", started]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(out.splitlines()[-1]))


if __name__ == "__main__":
    main()
