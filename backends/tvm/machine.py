"""What code is made for: a processor's vector instructions, and how the kernels' tiles follow from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dyncomp.backends.native.cross import this_architecture

from dyncomp.errors import BackendError, RequestError
from dyncomp.hardware import detect, extensions

_FEATURES = {"avx2": "avx2", "avx512f": "avx512f", "avx512_vnni": "avx512vnni", "asimd": "neon", "asimddp": "dotprod"}
_V3 = ("avx", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe")
_V4 = ("avx2", *_V3, "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_TAKEN_ALONG = {"avx2": _V3, "avx512f": _V4, "avx512_vnni": ("avx512f", *_V4)}
"""What code for one of :data:`_FEATURES` uses besides: the compiler is told x86-64-v3 or v4, which are these sets (x86-64 psABI, 3.1.1)."""


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

    @property
    def title(self) -> str:
        """For people: ``aarch64 with asimd``."""
        return self.architecture + (f" with {', '.join(self.vector)}" if self.vector else "")

    def describe(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"vector": list(self.vector)}


MACHINES = {
    "x86-64": Machine("x86_64", (), 4),
    "x86-64-v3": Machine("x86_64", ("avx2",), 4),
    "x86-64-v4": Machine("x86_64", ("avx2", "avx512f"), 4),
    "aarch64": Machine("aarch64", ("asimd",), 4),
}
"""Processors by the name of what they have at least, for code that is made elsewhere; four cores are assumed."""


def machine_named(name: str) -> Machine:
    """Raises:
    RequestError: there is no description of that name.
    """
    if name not in MACHINES:
        raise RequestError(f"there is no target {name!r}", hint=f"targets: {', '.join(MACHINES)}; cuda-sm_80, cuda-sm_90")
    return MACHINES[name]


def this_machine() -> Machine:
    """The machine this runs on.

    Raises:
        BackendError: it is neither x86-64 nor aarch64.
    """
    found = detect()
    architecture = this_architecture()
    if architecture not in ("x86_64", "aarch64"):
        raise BackendError(f"the TVM backend makes code for x86-64 and aarch64; this is {found.architecture}", hint="use --backend ort")
    here = extensions()
    usable = tuple(v for v in found.vector if v in _FEATURES and here.issuperset(_TAKEN_ALONG.get(v, ())))
    return Machine(architecture, usable, found.cores)


def require_machine(built_for: dict[str, Any]) -> None:
    """Refuse code for another processor.

    Raises:
        BackendError: names what this processor lacks.
    """
    machine = detect()
    if built_for["architecture"].startswith("cuda"):
        raise BackendError(
            f"these are kernels for a GPU ({built_for['architecture']}); dyncomp runs models on CPUs",
            hint="lower the model for this machine: dyncomp export --backend tvm",
        )
    architecture = this_architecture()
    hint = "lower the model again on this machine: dyncomp convert --backend tvm"
    if built_for["architecture"] != architecture:
        raise BackendError(f"the TVM library was built for {built_for['architecture']}; this machine is {architecture}", hint=hint)
    here = extensions()
    missing = sorted({e for v in built_for["vector"] for e in (v, *_TAKEN_ALONG.get(v, ())) if e not in here})
    if missing:
        raise BackendError(f"the TVM library uses {', '.join(missing)}, which this processor ({machine.cpu}) does not have", hint=hint)
