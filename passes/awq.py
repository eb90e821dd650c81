"""Pass ``awq``: scale the inputs of linear layers so that rounding their weights costs least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from dyncomp.passes.awq_sites import Site, find_sites
from dyncomp.passes.gptq import gated_hidden, gram_of
from dyncomp.passes.mixtures import ENOUGH
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.ops import keep_large
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.quantized import BLOCKS, round_to_nearest
from dyncomp.regions import RoutedFFN, find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.norm import fuse_rms_norms
from dyncomp.sweep import Sweep, fast_matmul, release_memory

STEPS = 20
"""Exponents that are tried, from 0 (no scale) to 1."""
_ROWS = 512
"""Rows of a weight that exponents are tried on: one number is to be found, and thousands of rows agree about it."""


@dataclass(frozen=True)
class AWQ(Pass):
    """Activation-aware scales (AWQ, 2306.00978): the weights that read large inputs are made larger, so that they are rounded less.

    Input j of a linear layer is divided by s_j, and column j of its weight multiplied: the model computes what it did. The division goes
    into what makes the input: the weight of a norm that only linear layers, experts and routers read, or the rows of the up-projection
    of a gated FFN before its down-projection, each expert's by itself. s is the mean magnitude of the inputs to the power of an exponent,
    for which the layers' outputs change least when their weights are rounded to nearest. ``quantize`` with the same ``bits``, ``block``
    and ``symmetric`` is to follow.

    In a graph with gates or thresholds, scales are powers of two, which floats multiply by exactly: they choose what they chose. Elsewhere
    scales are as they come out, which leaves a little less error.

    before:  x = rms_norm(r, g);      linear(x, W);      sparse_linear(x, W, t);          gates(linear(x, R));      routed_ffn(x, U[E])
    after:   x = rms_norm(r, g / s);  linear(x, W * s);  sparse_linear(x, W * s, t / s);  gates(linear(x, R * s));  routed_ffn(x, U[E] * s)
    """

    name: ClassVar[str] = "awq"
    tolerance: ClassVar[float] = 1e-4

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    tokens: int = 4_096
    """Calibration tokens."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise RequestError(f"awq: {self.bits} bits are not supported", hint="use bits=4 or bits=8")
        if self.block not in BLOCKS:
            raise RequestError(f"awq: the block {self.block} is not one of {', '.join(map(str, BLOCKS))}")

    def sketch(self, kind: str) -> Pass | None:
        return None  # its scales become part of other weights

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        fuse_rms_norms(graph)
        result = PassResult(facts={"bits": self.bits, "exponents": {}})
        sites, result.refused = find_sites(graph, self.block)
        if not sites:
            return result
        exact = bool(find_routed(graph) or sparse_nodes(graph) or find_skips(graph))
        sweep = Sweep(graph, ctx.need_calibration(self.name).first(self.tokens))
        uses = {r.gates: _Use(torch.zeros(r.experts)) for site in sites for r in site.routed}
        watch: dict[fx.Node, Callable[[int, Tensor], None]] = {gates: use.note for gates, use in uses.items()}
        found: list[tuple[Site, Tensor]] = []
        with fast_matmul(), torch.no_grad():
            for position, site in enumerate(sites):
                sweep.advance(site.at, watch=watch)
                problem = self._experts(graph, site.experts, sweep, result) if site.experts else self._layers(graph, site, sweep, uses)
                exponents, scales = self._search(problem, exact)
                result.facts["exponents"][site.name] = exponents if site.experts else exponents[0]
                if any(exponents):
                    found.append((site, scales if site.experts else scales[0]))
                ctx.progress(self.name, position + 1, len(sites))
                release_memory(collect=False)
        for site, scales in found:  # at the end: the sweep goes on from values that were computed without
            site.scale(graph, scales)
            result.changed += site.weights
        graph.clean()
        return result

    def _layers(self, graph: Graph, site: Site, sweep: Sweep, uses: dict[fx.Node, _Use]) -> _Problem:
        """Of the layers that read one node."""
        inputs = [x.reshape(-1, x.shape[-1]) for x in sweep.values(site.input)]
        size = sum(map(len, inputs))
        problem = _Problem(torch.stack([x.abs().sum(0) for x in inputs]).sum(0)[None] / size)
        grams: dict[str | None, Tensor] = {}
        for reader in site.rounded:
            name = reader.thresholds
            if name not in grams:
                seen = inputs if name is None else (keep_large(x, graph.tensor(name)) for x in inputs)
                grams[name] = (gram_of(seen).float() / size)[None]
            weight = reader.rows(graph).float()
            shares = uses[reader.gates].shares(len(weight)) if reader.gates is not None else None
            step = -(-len(weight) // _ROWS)
            problem.parts.append((weight[None, ::step], grams[name], None if shares is None else shares[::step]))
        return problem

    def _experts(self, graph: Graph, routed: RoutedFFN, sweep: Sweep, result: PassResult) -> _Problem:
        """Of the down-projections of experts, each over the tokens that run it."""
        down = graph.tensor(routed.w_down).detach().float()
        count, _, neurons = down.shape
        magnitude, grams, ran = torch.zeros(count, neurons), torch.zeros(count, neurons, neurons), torch.zeros(count)
        for h, active in gated_hidden(graph, routed, sweep.values(routed.input), sweep.values(routed.gates)):
            magnitude += h.abs().sum(1)
            grams += h.transpose(1, 2) @ h
            ran += active.sum(0)
        for e in (ran < ENOUGH).nonzero().flatten().tolist():  # too few tokens to trust
            grams[e] = 0
            result.facts.setdefault("rarely_used", []).append(f"{routed.name} expert {e}: {int(ran[e])} tokens")
        return _Problem(magnitude / ran.clamp_min(1)[:, None], [(down, grams / ran.clamp_min(1)[:, None, None], None)])

    def _search(self, problem: _Problem, exact: bool) -> tuple[list[float], Tensor]:
        """(the best exponent of each group, [G, K] scales); ``exact`` ones are powers of two."""
        magnitude = problem.magnitude
        magnitude = magnitude.clamp_min(torch.finfo(torch.float32).tiny).maximum(1e-4 * magnitude.mean(-1, keepdim=True))
        best = torch.full(magnitude.shape[:1], torch.inf)
        exponents, chosen = torch.zeros(len(best)), torch.ones_like(magnitude)
        for step in range(STEPS):
            scales = magnitude ** (step / STEPS)
            scales = scales / (scales.amax(-1, keepdim=True) * scales.amin(-1, keepdim=True)).sqrt()
            if exact:
                scales = scales.log2().round().exp2()
            loss = torch.zeros_like(best)
            for weight, gram, shares in problem.parts:
                s = scales[:, None]
                changed = round_to_nearest(weight * s, self.bits, self.block, symmetric=self.symmetric).decode() / s - weight
                rows = ((changed @ gram) * changed).sum(-1)  # ||X dᵀ||² = d (XᵀX) dᵀ
                loss += (rows if shares is None else rows * shares).sum(-1)
            better = loss < best
            best, exponents = torch.where(better, loss, best), torch.where(better, step / STEPS, exponents)
            chosen = torch.where(better[:, None], scales, chosen)
        return [round(float(e), 4) for e in exponents], chosen


@dataclass
class _Problem:
    """What the scales of G groups of K inputs are chosen by.

    Attributes:
        magnitude: [G, K] mean magnitude of the inputs.
        parts: weights [G, N, K], Gram matrices [G, K, K] of the inputs, and how much each row counts ([N], or None for alike).
    """

    magnitude: Tensor
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = field(default_factory=list)


@dataclass
class _Use:
    """The squares of gates, summed over tokens as they pass: [E]."""

    squares: Tensor
    tokens: int = 0

    def note(self, _: int, gates: Tensor) -> None:
        flat = gates.reshape(-1, len(self.squares)).float()
        self.squares += flat.square().sum(0)
        self.tokens += len(flat)

    def shares(self, rows: int) -> Tensor:
        """[rows] what the square of an error in each row of all experts' up-projections counts."""
        return (self.squares / max(self.tokens, 1)).repeat_interleave(rows // len(self.squares))
