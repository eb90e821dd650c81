"""CUDA's compiler: found, run, and asked what each kernel takes."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dyncomp.errors import BackendError

EXTRA = "cuda"


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Args:
        threads: of a block, at most.
        registers: of a thread. shared_bytes: of a block. spilled_bytes: that a thread keeps in local memory, which is memory.
        wide_loads: instructions that read 16 bytes of global memory.
    """

    threads: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    wide_loads: int

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def find_nvcc() -> str | None:
    """On the path, or in the packages that NVIDIA has on PyPI."""
    if (found := shutil.which("nvcc")) is not None:
        return found
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return next((str(path) for place in places for path in sorted(Path(place).glob("*/bin/nvcc"))), None)


def threads_of(source: str) -> dict[str, int]:
    """The kernels of a CUDA source, and the threads of a block of each."""
    return {name: int(count) for count, name in re.findall(r"__global__ void __launch_bounds__\((\d+)\) (\w+)\([^)]*\) \{", source)}


def compile_cuda(nvcc: str, source: Path, architecture: str) -> dict[str, Resources]:
    """Write ``.ptx`` and ``.cubin`` beside a ``.cu``; what each of its kernels takes.

    Raises:
        BackendError: it cannot be compiled.
    """
    for kind in ("ptx", "cubin"):
        command = [nvcc, f"-{kind}", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-o", str(source.with_suffix(f".{kind}")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), "it says nothing")
            raise BackendError(
                f"{nvcc} cannot compile the kernels for {architecture}: {first[:300]}", hint="nvcc needs a C++ compiler, too"
            )
    bodies = re.split(r"\.visible \.entry (\w+)\(", source.with_suffix(".ptx").read_text())
    loads = {name: len(re.findall(r"ld\.global\.(?:nc\.)?v4", body)) for name, body in zip(bodies[1::2], bodies[2::2], strict=True)}
    parts = re.split(r"Compiling entry function '(\w+)'", done.stderr + done.stdout)
    found, threads = {}, threads_of(source.read_text())
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        numbers = {
            what: sum(int(n) for n in re.findall(pattern, text))
            for what, pattern in (
                ("registers", r"Used (\d+) registers"), ("shared_bytes", r"(\d+) bytes smem"),
                ("spilled_bytes", r"(\d+) bytes spill stores"),
            )
        }  # fmt: skip
        found[name] = Resources(threads=threads[name], wide_loads=loads[name], **numbers)
    return found
