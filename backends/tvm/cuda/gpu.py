"""GPUs that code is made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dyncomp.backends.tvm.machine import MACHINES, this_machine

from dyncomp.errors import RequestError


@dataclass(frozen=True)
class Gpu:
    """Args:
    architecture: ``sm_80`` (A100) …, as CUDA names it.
    threads, shared_bytes: the most that a block may have without asking for more.
    registers: of a multiprocessor, 32 bits each; threads_resident: the most it runs at a time.
    """

    architecture: str
    threads: int = 1024
    shared_bytes: int = 48 * 1024
    registers: int = 65536
    threads_resident: int = 2048

    def target(self) -> Any:
        """The ``tvm.target.Target``; its host is this machine."""
        import tvm

        return tvm.target.Target(
            {
                "kind": "cuda", "arch": self.architecture, "thread_warp_size": 32, "max_num_threads": self.threads,
                "max_threads_per_block": self.threads, "max_shared_memory_per_block": self.shared_bytes,
            },
            host=this_machine().target(),
        )  # fmt: skip


GPUS = {f"cuda-{name}": Gpu(name) for name in ("sm_80", "sm_90")}
"""By the name of a target."""


def gpu_named(name: str) -> Gpu:
    """Raises:
    RequestError: there is no description of that name.
    """
    if name not in GPUS:
        raise RequestError(f"there is no target {name!r}", hint=f"targets: {', '.join((*MACHINES, *GPUS))}")
    return GPUS[name]
