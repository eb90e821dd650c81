"""What this machine has: cores, vector instructions, memory, and how fast it reads and multiplies."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from dyncomp.cache import cache_folder
from dyncomp.whole import replacing

_VECTOR_EXTENSIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Hardware:
    """Args:
    cpu: model name.
    architecture: ``x86_64``, ``aarch64`` …
    cores: logical cores this process may use.
    vector: instruction set extensions that matter to kernels, as the system names them.
    memory_bytes: physical memory; 0 when unknown.
    """

    cpu: str
    architecture: str
    cores: int
    vector: tuple[str, ...]
    memory_bytes: int


def detect() -> Hardware:
    """Look at the machine; what cannot be found out is left empty, never guessed."""
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return Hardware(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=default_threads(),
        vector=tuple(f for f in _VECTOR_EXTENSIONS if f in flags),
        memory_bytes=_memory(),
    )


def default_threads() -> int:
    """Cores this process may use (its affinity mask), lowered by ``OMP_NUM_THREADS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdigit() and int(limit) else cores


@dataclass(frozen=True)
class Probe:
    """What was measured, by threads.

    Args:
        bandwidth: threads -> bytes a second, read from memory.
        peak: threads -> floating-point operations a second of a product of float32 matrices.
        disturbed: others had the cores meanwhile: the figures are too low, nothing is decided by them, and they are not kept.
    """

    bandwidth: dict[int, float]
    peak: dict[int, float]
    disturbed: bool = False


_SIDE, _TIMES = 768, 5  # of the matrices; attempts, of which the best counts: whatever else runs only makes a machine slower
_OWN = 0.8
"""Share of the cores' time that even the best attempt must have had."""


def thread_counts() -> list[int]:
    """1, 2, 4 … and as many as this process may use."""
    most = default_threads()
    return sorted({min(1 << i, most) for i in range(most.bit_length() + 1)})


def probe() -> Probe:
    """Measured when it is first asked for, in less than a second, and kept in the cache folder for this machine."""
    import torch

    counts = thread_counts()
    key = hashlib.sha256(json.dumps([asdict(detect()), counts, torch.__version__]).encode()).hexdigest()[:24]
    file = cache_folder() / "hardware" / f"{key}.json"
    try:
        kept = json.loads(file.read_bytes())
        bandwidth, peak = ({n: float(kept[name][str(n)]) for n in counts} for name in ("bandwidth", "peak"))
        return Probe(bandwidth, peak)
    except (OSError, ValueError, KeyError, TypeError):  # a damaged file counts as absent: it is a cache
        found = _measure(counts)
    if not found.disturbed:
        with replacing(file) as part:
            part.write_text(json.dumps(asdict(found), indent=1) + "\n")
    return found


def _measure(counts: list[int]) -> Probe:
    import torch

    before = torch.get_num_threads()
    memory = torch.ones(max(1 << 23, cache_bytes() // 2))  # float32: twice the cache, at least 32 MiB
    left, right = torch.ones(_SIDE, _SIDE), torch.ones(_SIDE, _SIDE)
    bandwidth, peak, own = {}, {}, []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            read, reading = _best(memory.sum)
            multiply, multiplying = _best(lambda: left @ right)
            bandwidth[threads], peak[threads] = memory.nbytes / read, 2 * _SIDE**3 / multiply
            own += [reading / threads, multiplying / threads]
    finally:
        torch.set_num_threads(before)
    return Probe(bandwidth, peak, min(own) < _OWN)


def _best(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the fastest of some calls, after one that is not counted, and how many cores it had meanwhile."""
    call()
    found = []
    for _ in range(_TIMES):
        start, used = time.perf_counter(), time.process_time()
        call()
        seconds = time.perf_counter() - start
        found.append((seconds, (time.process_time() - used) / seconds))
    return min(found)


def cache_bytes() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int(file.read_text().strip().removesuffix("K")) * 1024)
    return max(sizes, default=1 << 25)


def available_memory() -> int:
    """Bytes that a process may still take without others being swapped out, within its container's limit; 0 when unknown."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        found = [int(fields["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return _memory()
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of control groups, version 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max" is none
            found.append(int((Path("/sys/fs/cgroup") / limit).read_text()))
    return min(found)


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
