"""What tests share besides the tiny models."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx

import dyncomp.ops  # noqa: F401  (registers the operations)
from dyncomp.cache import cache_folder
from dyncomp.graph import Builder, Graph
from dyncomp.regions import FFN, replace_ffn

aten = torch.ops.aten


def own_cache(folder: Path) -> str:
    """A new cache folder for DYNCOMP_CACHE; what takes long, the native operators and the tokens of packaged texts, is the real one's."""
    folder.mkdir()
    for name in ("native", "tokens"):
        kept = cache_folder() / name
        kept.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(kept)
    return str(folder)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert bool(torch.isfinite(actual).all()), "not all values are finite"
    if not expected.numel():
        return 0.0
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def assert_close(actual: Tensor, expected: Tensor, *, rel: float) -> None:
    """Fail unless the largest deviation is at most ``rel`` times the largest expected magnitude."""
    error = relative_error(actual, expected)
    assert error <= rel, f"relative error {error:.2e} > {rel:.0e}"


def route(graph: Graph, ffn: FFN, *, experts: int, gate: float = 1.0) -> None:
    """Replace an FFN by ``dyncomp::routed_ffn`` with its neurons dealt out in turn, every gate the same."""
    weights = ffn.weights(graph)
    order = torch.arange(ffn.d_ff).reshape(-1, experts).t().reshape(-1)  # expert e holds the neurons e, e + E, …

    def split(rows: Tensor) -> Tensor:
        """[n * F, …] -> [E, n * F / E, …]"""
        halves = rows.reshape(-1, ffn.d_ff, *rows.shape[1:])[:, order]
        return halves.unflatten(1, (experts, -1)).transpose(0, 1).flatten(1, 2).contiguous()

    names = {"w_up": split(weights.w_up), "w_down": weights.w_down[:, order].unflatten(1, (experts, -1)).transpose(0, 1).contiguous()}
    if weights.b_up is not None:
        names["b_up"] = split(weights.b_up)
    if weights.b_down is not None:
        names["b_down"] = weights.b_down
    for name, value in names.items():
        graph.add_tensor(f"{ffn.name}.routed.{name}", value.clone())

    def read(name: str) -> fx.Node | None:
        return graph.read(f"{ffn.name}.routed.{name}") if name in names else None

    def build(builder: Builder, x: fx.Node) -> fx.Node:
        total = builder.call(aten.sum.dim_IntList, x, [-1], True)
        rows = builder.call(aten.expand.default, total, [-1] * (x.meta["val"].dim() - 1) + [experts])
        gates = builder.call(aten.add.Tensor, builder.call(aten.mul.Tensor, rows, 0.0), gate)
        y = builder.call(torch.ops.dyncomp.routed_ffn.default, x, gates, read("w_up"), read("b_up"), read("w_down"), ffn.activation)
        return y if weights.b_down is None else builder.call(aten.add.Tensor, y, read("b_down"))

    replace_ffn(graph, ffn, build)
