"""What has no kernel of ours is scheduled all the same: nothing that TVM compiles is a plain loop nest."""

# ruff: noqa: E402  (what needs TVM is imported after asking for it)

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close
from test_ort import with_cache
from torch import Tensor

from bench.tiny import ARCHITECTURES, trace_tiny
from dyncomp.graph import Graph
from dyncomp.trace import trace

tvm = pytest.importorskip("tvm")

from dyncomp.backends.tvm import compile as compiling
from dyncomp.backends.tvm.lower import lower
from dyncomp.backends.tvm.machine import Machine
from dyncomp.backends.tvm.run import TvmModel
from dyncomp.backends.tvm.schedule import is_scheduled


class Stopped(Exception):
    pass


def functions_of(graph: Graph, folder: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine | None = None) -> dict[str, Any]:
    """What would be compiled."""
    found: dict[str, Any] = {}

    def stop(module: Any, **_: Any) -> None:
        found.update({v.name_hint: f for v, f in module.functions.items() if isinstance(f, tvm.tirx.PrimFunc)})
        raise Stopped

    monkeypatch.setattr(compiling.tvm, "compile", stop)
    with pytest.raises(Exception, match="TVM cannot compile"):
        lower(graph, folder, machine=machine)
    monkeypatch.undo()
    assert found
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "whisper_encoder"])
def test_nothing_is_left_unscheduled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace_tiny(name)
    graph = with_cache(graph) if ARCHITECTURES[name].vocab else graph
    functions = functions_of(graph, tmp_path, monkeypatch)
    assert [n for n, f in functions.items() if not is_scheduled(f)] == []


class Pointwise(torch.nn.Module):
    """Element by element, along rows, gathers, a product of two inputs, and sums over the last dimension and over another one."""

    def forward(self, x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        table = torch.softmax(x @ y, -1)  # [B, 48, 32]
        picked = table[:, :, :1] * x.sum(1, keepdim=True).mean(-1, keepdim=True) + torch.where(table > 0.1, table, -table)
        return picked + torch.nn.functional.embedding(ids, y[0].t())[:, None, :32].sum(2, keepdim=True) + (x > 0).float().mean(1).sum()


def test_scheduled_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 48, 64, generator=generator), torch.randn(2, 64, 32, generator=generator)
    ids = torch.randint(0, 32, (2,), generator=generator)
    dims = {name: {0: "batch"} for name in ("x", "y", "ids")}
    graph = trace(Pointwise(), {"x": x, "y": y, "ids": ids}, dims)
    functions = functions_of(graph, tmp_path, monkeypatch, Machine("x86_64", ("avx2",), 2))
    code = {name: function.script() for name, function in functions.items()}
    product = next(text for name, text in code.items() if "matmul" in name)
    assert re.search(r"T\.vectorized\((T\.int64\()?8\b", product), product
    assert "T.parallel" in product
    lower(graph, tmp_path)
    (given,) = TvmModel(tmp_path, threads=2).run(x=x, y=y, ids=ids).values()
    assert_close(torch.from_numpy(given), graph(x=x, y=y, ids=ids), rel=1e-5)


class Patches(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 10, (4, 2), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    ("options", "linear"), [({"stride": (4, 2)}, True), ({"stride": (4, 2), "bias": False}, True), ({"stride": 2}, False)]
)
def test_convolutions_over_patches_are_linear_layers(options: dict[str, Any], linear: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 8)
    graph = trace(Patches(**options).eval().requires_grad_(False), {"x": x}, {"x": {0: "batch"}})
    kernels = lower(graph, tmp_path).kernels
    assert any(name.startswith("linear_10_24") for name in kernels) == linear
    assert any("conv2d" in name for name in kernels) != linear
    for batch in (1, 3):
        x = torch.randn(batch, 3, 12, 8)
        (given,) = TvmModel(tmp_path, threads=1).run(x=x).values()
        assert_close(torch.from_numpy(given), graph(x=x), rel=1e-5)
