"""A compiler for processors that this machine does not have."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from typing import Any, Literal

from dyncomp.errors import BackendError

EXTRA = "cross"
_DRIVERS = {"c": ("gcc", "cc"), "c++": ("g++", "c++")}


def this_architecture() -> str:
    """``x86_64``, ``aarch64`` …, as targets are named."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def cross_compiler(architecture: str, language: Literal["c", "c++"] = "c") -> tuple[str, ...]:
    """The command that compiles and links for Linux on ``architecture``: ``aarch64-linux-gnu-gcc``, or Zig's (``pip install ziglang``).

    Raises:
        BackendError: there is neither.
    """
    gnu, zig = _DRIVERS[language]
    triple = f"{architecture}-linux-gnu"
    if (found := shutil.which(f"{triple}-{gnu}")) is not None:
        return (found,)
    if importlib.util.find_spec("ziglang") is not None:
        return (sys.executable, "-m", "ziglang", zig, "-target", triple)
    raise BackendError(
        f"a library for {architecture} needs a cross compiler: there is neither {triple}-{gnu} nor the Python package ziglang",
        hint=f"pip install 'dyncomp[{EXTRA}]', which brings ziglang, or install {triple}-{gnu}",
    )


def shared_library(architecture: str) -> Any:
    """``link(output, objects)`` that makes a shared library for ``architecture`` with :func:`cross_compiler`, as TVM's export takes it.

    Raises:
        BackendError: there is no cross compiler; ``link`` raises it when that fails.
    """
    command = cross_compiler(architecture)

    def link(output: str, objects: list[str], **_: Any) -> None:
        done = subprocess.run([*command, "-shared", "-fPIC", "-o", output, *objects], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"{' '.join(command)} cannot link for {architecture}: {done.stderr.strip()[:300]}")

    link.output_format = "so"  # type: ignore[attr-defined]
    return link


def architecture_of(library: bytes) -> str:
    """What the header of an ELF library says it is for: ``x86_64``, ``aarch64``; for others the number; empty when it is no ELF file."""
    if library[:4] != b"\x7fELF":
        return ""
    machine = int.from_bytes(library[18:20], "little" if library[5] == 1 else "big")
    return {62: "x86_64", 183: "aarch64"}.get(machine, str(machine))
