"""Code for processors that are not this one: what it is made of, and that it is refused here. What needs a cross compiler skips without."""

# ruff: noqa: E402  (what needs TVM is imported after asking for it)

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from test_export import make_bundle
from test_ort import carve, with_cache

from bench.tiny import trace_tiny
from dyncomp.errors import BackendError, RequestError
from dyncomp.export import ExportRequest, export
from dyncomp.hardware import Hardware

tvm = pytest.importorskip("tvm")

from dyncomp.backends.artifact import CONFIG
from dyncomp.backends.native import cross
from dyncomp.backends.tvm import machine as machines
from dyncomp.backends.tvm.kernels import linear, routed_ffn
from dyncomp.backends.tvm.kernels.tile import Tile
from dyncomp.backends.tvm.layout import LIBRARY
from dyncomp.backends.tvm.lower import lower
from dyncomp.backends.tvm.machine import machine_named, this_machine
from dyncomp.backends.tvm.run import TvmModel

FOREIGN = "aarch64" if this_machine().architecture == "x86_64" else "x86-64-v3"
MULTIPLY_ADD = {"aarch64": r"\bfmla\s+v\d+\.4s", "x86-64-v3": r"\bvfmadd\w+ps\s.*%ymm"}


def test_code_uses_only_what_the_processor_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler is told x86-64-v3 or v4: each of their instruction sets is asked for, not AVX2 or AVX-512F alone."""
    monkeypatch.setattr(machines, "this_architecture", lambda: "x86_64")
    every = {"avx2", "avx512f", "avx512_vnni", *machines._TAKEN_ALONG["avx512_vnni"]}

    def with_flags(flags: set[str]) -> machines.Machine:
        monkeypatch.setattr(machines, "extensions", lambda: frozenset(flags))
        vector = tuple(v for v in ("avx2", "avx512f", "avx512_vnni") if v in flags)
        monkeypatch.setattr(machines, "detect", lambda: Hardware("a processor", "x86_64", 2, vector, 0))
        return machines.this_machine()

    whole = with_flags(every)
    assert whole.vector == ("avx2", "avx512f", "avx512_vnni")
    for absent, vector in [("avx512bw", ("avx2",)), ("avx512dq", ("avx2",)), ("avx512vl", ("avx2",)), ("fma", ()), ("avx512f", ("avx2",))]:
        assert with_flags(every - {absent}).vector == vector, absent
        with pytest.raises(BackendError, match=f"uses {absent}, which this processor"):
            machines.require_machine(whole.describe())
        machines.require_machine(machines.this_machine().describe())


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v3"])
def test_schedules_follow_the_target(name: str) -> None:
    """The products of the kernels are vector instructions, as wide as the target has them and no wider."""
    machine = machine_named(name)
    tile = Tile.of(machine)
    for kernel in (linear.linear(128, 64, tile), routed_ffn.routed_ffn(4, 64, 64, 128, "silu", gated=True, tile=tile)):
        module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
        code = tvm.compile(module, target=machine.target()).mod.inspect_source("asm")
        assert len(re.findall(MULTIPLY_ADD[name], code)) >= tile.rows * tile.vectors
        absent = {"aarch64": "%[xyz]mm", "x86-64-v3": "%zmm|\\bfmla"}[name]
        assert not re.search(absent, code)


@pytest.mark.parametrize("routed", [False, True])
def test_a_library_for_another_architecture(routed: bool, tmp_path: Path) -> None:
    machine = machine_named(FOREIGN)
    if importlib.util.find_spec("ziglang") is None and shutil.which(f"{machine.architecture}-linux-gnu-gcc") is None:
        pytest.skip(f"needs ziglang or {machine.architecture}-linux-gnu-gcc")
    graph = trace_tiny("llama")
    if routed:
        carve(graph, 4, threshold=0.2)
    kernels = lower(with_cache(graph), tmp_path, machine=machine).kernels
    assert any(k.startswith("routed_ffn") for k in kernels) == routed
    assert cross.architecture_of((tmp_path / LIBRARY).read_bytes()) == machine.architecture
    assert json.loads((tmp_path / CONFIG).read_text())["machine"] == machine.describe()
    with pytest.raises(BackendError, match=f"built for {machine.architecture}; this machine is {this_machine().architecture}"):
        TvmModel(tmp_path)


def test_without_a_cross_compiler_both_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ziglang" else importlib.machinery.ModuleSpec(name, None))
    with pytest.raises(BackendError, match=r"neither riscv64-linux-gnu-g\+\+ nor the Python package ziglang") as told:
        cross.cross_compiler("riscv64", "c++")
    assert "dyncomp[cross]" in str(told.value.hint)


def test_export_for_this_machine_is_held_against_the_graph(tmp_path: Path) -> None:
    graph = trace_tiny("llama")
    graph.info |= {"task": "causal-lm", "context_length": 64}
    carve(graph, 4, threshold=0.2)
    made = make_bundle(tmp_path, graph)
    record = export(ExportRequest(made, tmp_path / "out", backend="tvm"))
    assert record["check"]["relative_error"] < 1e-5
    assert record["machine"] == this_machine().describe()
    with pytest.raises(RequestError, match="no target 'z80'"):
        export(ExportRequest(made, tmp_path / "other", backend="tvm", target="z80"))
    with pytest.raises(RequestError, match="runs anywhere"):
        ExportRequest(made, tmp_path / "other", backend="ort", target="aarch64").validate()
