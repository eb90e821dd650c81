"""Pass ``prune-static``: the baseline that needs no routing at all."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from dyncomp.passes.carve_experts import kept_dense
from dyncomp.passes.least_squares import LeastSquares, enough_tokens
from torch import Tensor, fx

from dyncomp.activations import ACTIVATIONS, emit_activation
from dyncomp.errors import RequestError
from dyncomp.graph import Builder, Graph
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import FFN, FFNWeights, find_regions, replace_ffn
from dyncomp.regions.refusal import Refusal
from dyncomp.sweep import Sweep, fast_matmul, reduced_products, release_memory

aten = torch.ops.aten


@dataclass(frozen=True)
class PruneStatic(Pass):
    """Remove the same neurons for every token.

    Neurons are kept by FLAP's fluctuation score Var(h) * ||w_down||² (2312.11983, section 3.2); the rest is compensated by their
    mean output (a bias), or, with ``refit``, by least squares on the kept neurons, exactly as ``refit-down`` does it.

    before:  linear(x, gate [F, d]) …  linear(., down [d, F])
    after:   linear(x, gate [kF, d]) … linear(., down [d, kF]) + b
    """

    name: ClassVar[str] = "prune-static"

    active: float = 0.75
    """Fraction of all FFN neurons that remains, FFNs kept dense included."""
    refit: bool = True
    ridge: float = 0.2
    keep_dense: tuple[int, ...] | None = None
    """As of ``carve-experts``."""
    multiple: int = 1
    """Neurons that remain are a multiple of this: blocks of quantized weights must divide them."""

    def __post_init__(self) -> None:
        if not 0 < self.active <= 1:
            raise RequestError(f"prune-static: the fraction {self.active:g} is not in (0, 1]", hint="for example active=75%")
        if self.multiple < 1:
            raise RequestError(f"prune-static: multiple={self.multiple} is not a number of neurons", hint="for example multiple=32")

    def sketch(self, kind: str) -> Pass | None:
        return dataclasses.replace(self, refit=False, keep_dense=()) if kind == "ffn" else None

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        ffns = find_regions(graph).ffns
        dense = kept_dense(self.keep_dense, len(ffns))
        width, kept = sum(f.d_ff for f in ffns), sum(ffns[i].d_ff for i in dense)
        share = (self.active * width - kept) / max(width - kept, 1)
        if share <= 0:
            raise RequestError(
                f"prune-static: {self.active:.0%} is not possible with {len(dense)} FFNs kept dense", hint="keep fewer dense"
            )
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(enough_tokens(max(f.d_ff for f in ffns))))
        result = PassResult(facts={"active": self.active})
        with fast_matmul(), torch.no_grad():
            for position, ffn in enumerate(ffns):
                ctx.progress(self.name, position + 1, len(ffns))
                if position in dense:
                    continue
                if ffn.shared_weights:
                    result.refused.append(Refusal(ffn.name, self.name, "its weights are read by another layer", "keep it dense"))
                    continue
                count = max(1, round(share * ffn.d_ff / self.multiple)) * self.multiple
                sweep.provide(*self._prune(graph, ffn, count, sweep.advance(ffn.input), ctx))
                result.changed.append(ffn.name)
                release_memory(collect=False)
        return result

    def _prune(self, graph: Graph, ffn: FFN, count: int, inputs: list[Tensor], ctx: Context) -> tuple[fx.Node, list[Tensor]]:
        """(the node that stands for the FFN's output now, what it gives for each batch)."""
        weights = ffn.weights(graph)
        inputs = [x.movedim(ffn.ups[0].axis, -1) for x in inputs]
        blocks = [x.reshape(-1, ffn.d_model) for x in inputs]
        hidden = [_hidden(x, weights, ffn) for x in blocks]
        mean, square = _moments(ffn, hidden, ctx)
        score = (square - mean.square()) * weights.w_down.square().sum(0)
        keep = score.topk(count).indices.sort().values
        dropped = torch.ones(ffn.d_ff, dtype=torch.bool).index_fill(0, keep, False).nonzero().flatten()
        order = torch.cat([keep, dropped])  # kept neurons first: both parts are then plain slices
        weights, mean = _reorder(weights, ffn, order), mean[order]
        for index, h in enumerate(hidden):
            hidden[index] = h[:, order]
        down, rest = weights.w_down[:, :count], weights.w_down[:, count:]
        bias = rest @ mean[count:]
        if self.refit:
            problem = LeastSquares(count, ffn.d_out)
            for h in hidden:
                with reduced_products():
                    missing = (h[:, count:] @ rest.T).float()
                problem.add(h[:, :count], missing)
            delta, bias = problem.solve(self.ridge)
            down = down + delta.T
        halves = weights.w_up.view(-1, ffn.d_ff, ffn.d_model)[:, :count]
        biases = None if weights.b_up is None else weights.b_up.view(-1, ffn.d_ff)[:, :count]
        total = bias if weights.b_down is None else weights.b_down + bias
        with reduced_products():
            outputs = [torch.nn.functional.linear(h[:, :count], down, total).float() for h in hidden]
        outputs = [y.view(*x.shape[:-1], -1).movedim(-1, ffn.output_axis) for x, y in zip(inputs, outputs, strict=True)]
        return _replace(graph, ffn, halves, biases, down.contiguous(), total), outputs


def _reorder(weights: FFNWeights, ffn: FFN, order: Tensor) -> FFNWeights:
    """The same FFN with its neurons in another order."""
    w_up = weights.w_up.view(-1, ffn.d_ff, ffn.d_model)[:, order].flatten(0, 1)
    b_up = None if weights.b_up is None else weights.b_up.view(-1, ffn.d_ff)[:, order].flatten()
    return FFNWeights(w_up, b_up, weights.w_down[:, order].contiguous(), weights.b_down)


def _moments(ffn: FFN, hidden: list[Tensor], ctx: Context) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the hidden activations: from the calibration statistics, or computed where there are none."""
    if ctx.calibration is not None and ffn.name in ctx.calibration.statistics:
        statistics = ctx.calibration.statistics[ffn.name]
        return statistics.mean, statistics.square
    total = torch.zeros(2, ffn.d_ff, dtype=torch.float64)
    for h in map(torch.Tensor.float, hidden):
        total += torch.stack([h.sum(0), h.square().sum(0)])
    mean, square = (total / sum(map(len, hidden))).float()
    return mean, square


def _hidden(x: Tensor, weights: FFNWeights, ffn: FFN) -> Tensor:
    """[n, d] -> [n, F], in bfloat16 where products are."""
    with reduced_products():
        h = torch.nn.functional.linear(x, weights.w_up, weights.b_up)
    return ACTIVATIONS[ffn.activation](h[:, : ffn.d_ff]) * h[:, ffn.d_ff :] if ffn.gated else ACTIVATIONS[ffn.activation](h)


def _replace(graph: Graph, ffn: FFN, halves: Tensor, biases: Tensor | None, down: Tensor, bias: Tensor) -> fx.Node:
    """Put a plain FFN of the kept neurons in place of ``ffn``; returns the node that stands for its output."""
    parts = ("gate", "up") if ffn.gated else ("up",)
    for part, half in zip(parts, halves, strict=True):
        graph.add_tensor(f"{ffn.name}.pruned.{part}", half.contiguous())
    for part, half in zip(parts, biases if biases is not None else (), strict=False):
        graph.add_tensor(f"{ffn.name}.pruned.{part}_bias", half.contiguous())
    graph.add_tensor(f"{ffn.name}.pruned.down", down)
    graph.add_tensor(f"{ffn.name}.pruned.down_bias", bias)

    def build(builder: Builder, x: fx.Node) -> fx.Node:
        def linear(source: fx.Node, part: str, *, biased: bool) -> fx.Node:
            extra = (graph.read(f"{ffn.name}.pruned.{part}_bias"),) if biased else ()
            return builder.call(aten.linear.default, source, graph.read(f"{ffn.name}.pruned.{part}"), *extra)

        h = emit_activation(builder.call, ffn.activation, linear(x, parts[0], biased=biases is not None))
        if ffn.gated:
            h = builder.call(aten.mul.Tensor, h, linear(x, "up", biased=biases is not None))
        return linear(h, "down", biased=True)

    return replace_ffn(graph, ffn, build)
