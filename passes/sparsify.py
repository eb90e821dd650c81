"""Pass ``sparsify``: linear layers that count small inputs as zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.block_budgets import WINDOWS, Choice, block_shares
from dyncomp.passes.sensitivity import Sensitivity, sensitivity
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.ops import gated_linear, keep_large, sparse_linear
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import Linear, find_linears, find_regions
from dyncomp.regions.depth import find_skips
from dyncomp.regions.linear import PRODUCTS
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul

aten = torch.ops.aten
_GATED = gated_linear._opoverload
BUDGETS = ("block", "global", "uniform")
_SAMPLE = 4_000_000  # values that a threshold is taken from


@dataclass(frozen=True)
class Sparsify(Pass):
    """Count the inputs of linear layers that matter least for a token as zero, so that their weights need not be read.

    before:  linear(x, W, b)
    after:   dyncomp.sparse_linear(x, W, b, thresholds)

    An input counts where ``|x_j| * importance_j`` exceeds a threshold of the layer (TEAL, 2408.14690; WINA, 2505.19427).
    Layers that read the same activations (query, key and value; gate and up) share it, and so one choice of inputs. Thresholds are
    quantiles on calibration text, each layer's on what the converted layers before it give; the vocabulary head is left alone.

    With ``budgets=block`` the layers of a residual block share what it may leave out as changes its output least
    (:mod:`~dyncomp.passes.block_budgets`): an FFN can do without most of the inputs of its down-projection.
    With ``budgets=global`` what is left out of a layer is not the same fraction everywhere: an input of ``n`` outputs may be left out
    when ``(x_j * importance_j)^2 / n`` is below one limit for the whole model. With ``score=fisher`` that is the rise of the KL
    divergence to the dense model, to second order, for each weight that is not read (:mod:`~dyncomp.passes.sensitivity`).
    """

    name: ClassVar[str] = "sparsify"

    active: float = 0.75
    """Mean fraction of the inputs that count, over the layers in question, weighted by the weights that are read for them."""
    where: str = "all"
    """``all`` linear layers but the vocabulary head and routers, or those of each ``ffn``."""
    score: str = "teal"
    """importance_j: ``fisher``, the root mean square of the loss's derivative by x_j; ``wina``, the norm of W's column j; ``teal``, 1."""
    budgets: str = "block"
    """``block`` or ``global``, as above, or ``uniform``: the same fraction in every layer, which costs half as much
    perplexity again (docs/quality.md)."""
    windows: int = 16
    """Calibration windows that derivatives are taken on (``score=fisher``, ``budgets=global``)."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise RequestError(f"sparsify: the fraction {self.active:g} is not in (0, 1]", hint="for example active=75%")
        for option, known in (
            ("where", ("all", "ffn")),
            ("score", ("fisher", "wina", "teal")),
            ("budgets", ("block", "global", "uniform")),
        ):
            if (value := getattr(self, option)) not in known:
                raise RequestError(f"sparsify: {option}={value} is not known", hint=f"use {', '.join(known[:-1])} or {known[-1]}")
        if self.windows < 1:
            raise RequestError(f"sparsify: windows={self.windows} is not a number of windows", hint="for example windows=16")

    def sketch(self, kind: str) -> Pass | None:
        return dataclasses.replace(self, budgets="uniform", score="teal") if kind == "ffn" or self.where == "all" else None

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        result = PassResult(facts={"active": self.active})
        batches = ctx.need_calibration(self.name).batches
        sites = self._sites(graph, result)
        if not sites:
            reasons = "; ".join(sorted({f"{r.reason}: {r.remedy}" if r.remedy else r.reason for r in result.refused}))
            raise RequestError("sparsify: the graph has no linear layer that can be sparsified", hint=reasons or None)
        shares = dict.fromkeys((s.input for s in sites), self.active)
        found = None
        if self.score == "fisher" or self.budgets == "global":
            found = sensitivity(
                graph,
                {i.nodes[0]: s.input for s in sites for i in s.linears},
                ctx.need_calibration(self.name).windows()[: self.windows],
                seed=ctx.seed,
            )
        importance = {s.input: self._importance(graph, s, found) for s in sites}
        if self.budgets == "global" and found is not None:
            shares = _global_shares(sites, importance, found, self.active)
        if self.budgets == "block":
            shares = self._block_shares(graph, sites, importance, ctx)
        noted: dict[str, float] = dict(graph.info.get("active_inputs", {}))
        sweep = Sweep(graph, batches)
        with fast_matmul(), torch.no_grad():
            for position, site in enumerate(sites):
                ctx.progress(self.name, position + 1, len(sites))
                inputs = sweep.advance(site.input)
                thresholds, active = _threshold(inputs, importance[site.input], shares[site.input])
                for node in _make_sparse(graph, site, thresholds):
                    weight = str(node.args[1].target)  # type: ignore[union-attr]
                    noted[weight] = max(active, noted.get(weight, 0.0)) if weight in result.changed else active
                    result.changed.append(weight)
        graph.info["active_inputs"] = noted
        result.facts["active_inputs"] = {name: round(noted[name], 4) for name in result.changed}
        result.facts["calibrated"] = active_share(graph)
        return result

    def _sites(self, graph: Graph, result: PassResult) -> list[_Site]:
        """Linear layers by what they read, in graph order; notes those that are refused."""
        regions = find_regions(graph)
        routers = {n for r in regions.routed for n in r.router} | {s.scores for s in find_skips(graph)}
        inside = {n for f in regions.ffns for linear in (*f.ups, f.down) for n in linear.nodes}
        head = regions.head.node if regions.head is not None else None
        found: dict[fx.Node, list[Linear]] = {}
        for linear in find_linears(graph).values():
            product = linear.nodes[0]
            if product in routers or linear.node is head or (self.where == "ffn" and product not in inside):
                continue
            if linear.thresholds is not None:
                result.refused.append(Refusal(linear.weight, self.name, "small inputs of it count as zero already"))
            elif product.target is _GATED:
                result.refused.append(Refusal(linear.weight, self.name, "tokens skip it", "sparsify before skip-depth"))
            elif linear.axis != -1 or product.target not in PRODUCTS:
                result.refused.append(Refusal(linear.weight, self.name, "it is not a plain linear layer"))
            elif linear.weight in graph.quantized and linear.transposed:
                result.refused.append(Refusal(linear.weight, self.name, "its quantized weight is stored transposed", "quantize afterwards"))
            else:
                found.setdefault(linear.input, []).append(linear)
        return [_Site(node, linears) for node, linears in found.items()]

    def _block_shares(self, graph: Graph, sites: list[_Site], importance: Mapping[fx.Node, Tensor], ctx: Context) -> dict[fx.Node, float]:
        work = graph.copy()
        choices = []
        for site, copied in zip(sites, self._sites(work, PassResult()), strict=True):
            weights = importance[site.input]
            nodes = _make_sparse(work, copied, torch.full_like(weights, -1.0))
            cut = lambda inputs, share, weights=weights: _threshold(inputs, weights, share)[0]  # noqa: E731
            choices.append(Choice(tuple(nodes), str(nodes[0].args[3].target), site.outputs * len(weights), cut))  # type: ignore[union-attr]
        sample = ctx.need_calibration(self.name).windows()[:WINDOWS]
        with fast_matmul(), torch.no_grad():
            shares = block_shares(work, choices, sample, self.active, lambda done, all_: ctx.progress("block budgets", done, all_))
        return {site.input: share for site, share in zip(sites, shares, strict=True)}

    def _importance(self, graph: Graph, site: _Site, found: Sensitivity | None) -> Tensor:
        """[K]"""
        if self.score == "fisher" and found is not None:
            return found.fisher[site.input].sqrt()
        if self.score == "teal":
            return torch.ones(site.linears[0].in_features)
        return torch.stack([i.weight_matrix(graph).float().square().sum(0) for i in site.linears]).sum(0).sqrt()


def active_share(graph: Graph, measured: Mapping[str, float] | None = None) -> float:
    """The mean fraction of the inputs of sparse linear layers that count, by the weights that are read for them: in calibration, or as
    ``measured`` for each weight."""
    active = graph.info.get("active_inputs", {}) if measured is None else measured
    sizes = [(str(n.args[1].target), graph.tensor(n.args[1]).numel()) for n in sparse_nodes(graph)]  # type: ignore[union-attr, arg-type]
    return sum(active[name] * size for name, size in sizes) / sum(size for _, size in sizes)


@dataclass(frozen=True)
class _Site:
    """Linear layers that read the same node."""

    input: fx.Node
    linears: list[Linear]

    @property
    def outputs(self) -> int:
        """Weights that are read for each input."""
        return sum(linear.out_features for linear in self.linears)


def _global_shares(sites: list[_Site], importance: Mapping[fx.Node, Tensor], found: Sensitivity, active: float) -> dict[fx.Node, float]:
    """The fraction of each site's inputs whose worth, for each weight that is read, is above the limit that leaves ``active`` of all."""
    worth = {s.input: (found.inputs[s.input].float() * importance[s.input]).square().div_(s.outputs).log10_() for s in sites}
    sizes = {s.input: s.outputs * len(importance[s.input]) for s in sites}
    low, high = -60.0, 30.0
    for _ in range(50):
        limit = (low + high) / 2
        shares = {node: float((w > limit).float().mean()) for node, w in worth.items()}
        kept = sum(shares[node] * size for node, size in sizes.items()) / sum(sizes.values())
        low, high = (limit, high) if kept > active else (low, limit)
    return shares


def _threshold(inputs: list[Tensor], importance: Tensor, share: float) -> tuple[Tensor, float]:
    """([K] thresholds that leave ``share`` of the inputs, the fraction they really leave)."""
    rows = [x.reshape(-1, x.shape[-1]) for x in inputs]
    step = -(-sum(x.numel() for x in rows) // _SAMPLE)
    sample = torch.cat([x[::step] for x in rows])
    scores = (sample.float() * importance).abs().flatten()
    rank = round((1 - share) * scores.numel())
    limit = float(scores.kthvalue(rank).values) if rank else -1.0  # below zero: every input counts
    thresholds = limit / importance.clamp_min(torch.finfo(torch.float32).tiny)
    return thresholds.clamp_max(torch.finfo(torch.float32).max), float(
        (keep_large(sample, thresholds) != 0).float().mean()
    ) if rank else 1.0


def _make_sparse(graph: Graph, site: _Site, thresholds: Tensor) -> list[fx.Node]:
    """Put ``sparse_linear`` nodes, which read the same thresholds [K], in the place of the linear layers of a site."""
    shared = f"{site.linears[0].nodes[0].name}_thresholds"
    graph.add_tensor(shared, thresholds, trainable=False)
    return [_replace(graph, linear, shared) for linear in site.linears]


def _replace(graph: Graph, linear: Linear, thresholds: str) -> fx.Node:
    name = linear.weight
    if linear.transposed:
        name = f"{linear.weight}_by_rows"
        graph.add_tensor(name, linear.weight_matrix(graph).contiguous())
    weight = graph.read(name)
    bias = None if linear.bias is None else graph.read(linear.bias)
    with graph.inserting(before=linear.node, path=linear.node.meta.get("path")) as b:
        y = b.call(sparse_linear._opoverload, linear.input, weight, bias, graph.read(thresholds))
    linear.node.replace_all_uses_with(y)
    for node in reversed(linear.nodes):
        graph.module.graph.erase_node(node)
    return y
