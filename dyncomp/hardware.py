"""What this machine has: cores, vector instructions, memory."""

from __future__ import annotations

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

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
    info, flags = _cpu_info(), extensions()
    return Hardware(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        architecture=platform.machine(),
        cores=default_threads(),
        vector=tuple(f for f in _VECTOR_EXTENSIONS if f in flags),
        memory_bytes=_memory(),
    )


def extensions() -> frozenset[str]:
    """Every instruction set extension of this processor, as the system names them; empty when it does not say."""
    info = _cpu_info()
    return frozenset((info.get("flags") or info.get("Features") or "").split())


def default_threads() -> int:
    """Cores this process may use (its affinity mask), lowered by ``OMP_NUM_THREADS``."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdigit() and int(limit) else cores


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
