"""What code is made for: a processor's vector instructions, and how the kernels' tiles follow from them."""

from __future__ import annotations

import dataclasses
import platform
from dataclasses import dataclass, field
from typing import Any

from dyncomp.errors import BackendError
from dyncomp.hardware import detect

_FEATURES = {"avx2": "avx2", "avx512f": "avx512f", "avx512_vnni": "avx512vnni", "asimd": "neon", "asimddp": "dotprod"}


@dataclass(frozen=True)
class Machine:
    """Args:
    architecture: ``x86_64`` or ``aarch64``.
    vector: instruction set extensions used, as :func:`dyncomp.hardware.detect` names them.
    threads: cores that schedules should keep busy.
    """

    architecture: str
    vector: tuple[str, ...] = field(default=())
    threads: int = 1

    @property
    def lanes(self) -> int:
        """Floats in a vector register."""
        return 16 if "avx512f" in self.vector else 8 if "avx2" in self.vector else 4

    @property
    def vectors(self) -> int:
        """Vectors of a tile: with ``rows`` tokens their sums fill most of the registers (32, or 16 of AVX2 and SSE)."""
        return 4 if self.lanes == 16 or self.architecture == "aarch64" else 2

    @property
    def rows(self) -> int:
        return 6

    def target(self) -> Any:
        """The ``tvm.target.Target``."""
        import tvm

        attributes: dict[str, Any] = {"kind": "llvm", "num-cores": self.threads, "mattr": [f"+{_FEATURES[v]}" for v in self.vector]}
        if self.architecture == "x86_64":
            attributes["mcpu"] = "x86-64-v4" if "avx512f" in self.vector else "x86-64-v3" if "avx2" in self.vector else "x86-64"
            attributes["mtriple"] = "x86_64-linux-gnu"
        else:
            attributes["mtriple"] = "aarch64-linux-gnu"
        return tvm.target.Target(attributes)

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"vector": list(self.vector)}


def this_machine() -> Machine:
    """The machine this runs on.

    Raises:
        BackendError: it is neither x86-64 nor aarch64.
    """
    found = detect()
    architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(found.architecture.lower(), found.architecture)
    if architecture not in ("x86_64", "aarch64"):
        raise BackendError(f"the TVM backend makes code for x86-64 and aarch64; this is {found.architecture}", hint="use --backend ort")
    return Machine(architecture, tuple(v for v in found.vector if v in _FEATURES), found.cores)


def require_machine(built_for: dict[str, Any]) -> None:
    """Refuse code for another processor.

    Raises:
        BackendError: names what this processor lacks.
    """
    machine = detect()
    architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())
    hint = "lower the model again on this machine: dyncomp convert --backend tvm"
    if built_for["architecture"] != architecture:
        raise BackendError(f"the TVM library was built for {built_for['architecture']}; this machine is {architecture}", hint=hint)
    missing = [v for v in built_for["vector"] if v not in machine.vector]
    if missing:
        raise BackendError(f"the TVM library uses {', '.join(missing)}, which this processor ({machine.cpu}) does not have", hint=hint)
