"""Pass ``skip-depth``: let easy tokens skip attentions, FFNs or whole layers (Mixture-of-Depths)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from dyncomp.passes.across_tokens import refuse_decoders
from dyncomp.passes.depth_budget import STAND_IN_RIDGE, allocate, curves, fit_scores, quantile, stand_in
from dyncomp.passes.depth_exit import TARGETS, Exits, segments
from dyncomp.passes.depth_gates import ALWAYS, Gated, GatedUnit, Unit, insert_gates, shared_experts
from dyncomp.passes.depth_kv import POLICIES, KeysAndValues, keys_and_values
from dyncomp.passes.layerwise import residual_add, routing_facts
from dyncomp.passes.least_squares import LeastSquares, enough_tokens
from dyncomp.passes.recalibrate import Recalibrate
from torch import Tensor, fx

from dyncomp.errors import RequestError
from dyncomp.graph import Graph
from dyncomp.ops import sequence_scores
from dyncomp.pipeline import Context, Pass, PassResult
from dyncomp.regions import Attention, Regions, find_linears, find_regions
from dyncomp.regions.depth import find_parts, kv_bytes
from dyncomp.regions.refusal import Refusal
from dyncomp.routing import expert_choice
from dyncomp.sweep import Sweep, fast_matmul

WHAT = ("ffn", "attention", "block")
GATES = ("threshold", "expert-choice", "sequence", "exit")


@dataclass(frozen=True)
class SkipDepth(Pass):
    """Give attentions and FFNs a router that lets a token pass them by.

    before:  x + attention(norm(x)), x + ffn(norm(x))
    after:   gates = dyncomp.threshold_gates(linear(norm(x), router))                         # [B, S, 1]
             x + dyncomp.gated_linear(…, gates, Wo) + stand-in(norm(x)) for the tokens whose gate is 0
             x + dyncomp.routed_ffn(norm(x), gates, …) + stand-in(norm(x)) for the tokens whose gate is 0

    Mixture-of-Depths (2404.02258) without training: the router is the ridge regression of how much of a part's contribution the
    stand-in, a low-rank linear map, cannot give. ``gates`` says how its scores open gates, ``kv`` what later tokens see of a token that
    skipped an attention. Parts are fitted in order, each on what the fitted parts before it give, and the projection back to the residual
    stream of the tokens that stay is refitted as in ``refit-down``. How much each layer skips follows from what the loss is when that
    layer alone is replaced by its stand-in. Thresholds are then set on text that nothing was fitted to, where there is more of it.
    """

    name: ClassVar[str] = "skip-depth"

    what: str = "block"
    """``ffn``, ``attention``, or ``block``: an attention and the FFN after it, skipped together."""
    active: float = 0.875
    """Mean fraction of (token, part) visits that are computed, over all parts of that kind, those without a router included."""
    blocks: str = "auto"
    """``auto`` (shares by measured sensitivity), ``all`` or ``alternate`` (every other: equal shares), or positions: ``1+3+5``."""
    keep_first: int = 0
    keep_last: int = 0
    """Layers at the start and at the end that every token runs."""
    standin: str = "linear"
    """What a token that skips gets: ``linear``, a low-rank map fitted to what it would have got, ``none``, or with ``what=ffn`` after
    ``carve-experts{shared=N}`` the shared ``experts``, which it runs as every token does."""
    rank: int = 0
    """Of the stand-in, its constant counted; 0 for 128, or a quarter of the residual stream's width where that is less. SmolLM2, 12.5 % of
    the visits skipped: KL .172 with 32, .144 with 128, where the stand-ins of an attention and an FFN are 8 % of what they stand in for."""
    follow_dense: float = 0.5
    """0 fits to what the part itself gives, 1 to the dense model's residual stream; between them, a blend."""
    ridge: float = 1.0
    """Of the refit, as a fraction of the mean diagonal of the Gram matrix. SmolLM2, 12.5 % of the visits skipped: +10.4 % with .2, +9.9 %
    with 1, +10.5 % without a refit; on another source +10.0, +8.4 and +8.7 %; with every gate open KL is .034 with .2 and .013 with 1."""
    kv: str = "compute"
    """Keys and values of tokens that skip an attention: ``compute`` (as for all tokens), ``share`` (those of the attention before it, which
    needs heads of the same shape and the same rotary embedding) or ``absent`` (no other token attends to them). The last two also spare
    their projections."""
    gates: str = "threshold"
    """``threshold`` (each token by its own score), ``expert-choice`` (the tokens of a sequence that score highest, the same share of each;
    a decoder needs ``predictor``), ``sequence`` (all tokens of a sequence after the ``first`` alike, by the mean of their scores) or
    ``exit``: a token leaves at one of ``blocks`` and skips all that comes after, as in CALM (Schuster et al., 2207.07061), where its
    hidden state goes on to the keys and values of later layers (``kv=compute``). ``blocks=auto`` is then the middle and three quarters of
    the depth, and as many tokens leave at each."""
    target: str = "kl"
    """What the predictors of ``gates=exit`` are fitted to, by ridge of its logarithm on the token's own hidden state: ``kl``, between what
    the dense model predicts and what it predicts without the layers that are left, or ``entropy`` of the former, the measure of BranchyNet
    (1709.01686)."""
    predictor: bool = False
    """With ``expert-choice``: fit a predictor, from each token alone, of whether it is chosen. The graph then has the predictor's
    threshold gates, when it reads a whole sequence as well: figures are those of what decodes."""
    first: int = 16
    """With ``sequence``: how many tokens decide; they skip nothing. A prompt that is shorter goes on deciding while text is generated."""
    windows: int = 4
    """Calibration windows that ``blocks=auto`` measures the loss on; nothing is fitted to them."""

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise RequestError(f"skip-depth: what={self.what} is not known", hint=f"use {', '.join(WHAT)}")
        if not 0 < self.active <= 1:
            raise RequestError(f"skip-depth: the active fraction {self.active:g} is not in (0, 1]", hint="for example active=87.5%")
        require_stand_in(self.name, self.standin, self.rank, experts=True)
        if self.standin == "experts" and (self.what != "ffn" or self.gates == "exit"):
            raise RequestError(
                f"skip-depth: standin=experts with what={self.what} gates={self.gates}, and experts are an FFN's", hint="use what=ffn"
            )
        if self.kv not in POLICIES:
            raise RequestError(f"skip-depth: kv={self.kv} is not known", hint=f"use {', '.join(POLICIES)}")
        if self.kv != "compute" and self.what == "ffn":
            raise RequestError(f"skip-depth: kv={self.kv} with what=ffn, which has no keys", hint="use what=attention or what=block")
        if self.gates not in GATES:
            raise RequestError(f"skip-depth: gates={self.gates} is not known", hint=f"use {', '.join(GATES)}")
        if self.target not in TARGETS:
            raise RequestError(f"skip-depth: target={self.target} is not known", hint=f"use {' or '.join(TARGETS)}")
        if self.predictor and self.gates != "expert-choice":
            raise RequestError(f"skip-depth: a predictor of gates={self.gates}, which look at no later token", hint="leave it out")
        if self.first < 1:
            raise RequestError(f"skip-depth: first={self.first} tokens that decide", hint="at least 1")
        if self.blocks not in ("auto", "all", "alternate") and not all(p.lstrip("-").isdigit() for p in self.blocks.split("+")):
            raise RequestError(f"skip-depth: blocks={self.blocks} is not known", hint="use auto, all, alternate, or positions as 1+3+5")

    def run(self, graph: Graph, ctx: Context) -> PassResult:
        if self.gates == "expert-choice" and not self.predictor:
            refuse_decoders(graph, "skip-depth{gates=expert-choice}", hint="fit a causal predictor of the choice: predictor=true")
        if self.gates == "exit" and graph.info.get("task") != "causal-lm":
            raise RequestError("skip-depth{gates=exit}: the model does not predict the next token", hint="use gates=threshold")
        regions = find_regions(graph)
        units, refused = _units(graph, regions, self.what)
        if self.standin == "linear" and not self.rank:
            return dataclasses.replace(self, rank=usual_rank(units)).run(graph, ctx)
        if self.standin == "experts":
            lacking = [u for u in units if shared_experts(graph, u.parts[0]) is None]
            units = [u for u in units if u not in lacking]
            refused += [Refusal(u.name, "skip", "it has no shared experts", "carve-experts{shared=N} first") for u in lacking]
        kv = self._kv(graph, regions, units, refused)
        if not kv:
            reasons = "; ".join(sorted({r.reason for r in refused}))
            raise RequestError(f"skip-depth: the graph has no {self.what} that tokens can skip", hint=reasons or None)
        chosen = [i for i in self._chosen(len(units)) if i in kv]
        calibration, tokens = ctx.need_calibration(self.name), enough_tokens(max(u.width for u in units))
        batches, fresh = calibration.first(tokens), calibration.unfitted(tokens)
        ctx = dataclasses.replace(ctx, calibration=dataclasses.replace(calibration, batches=batches))
        skipped, most = (1 - self.active) * len(units), self._most(next(iter(batches[0].values())))
        if self.gates == "exit":
            return self._exits(graph, regions, units, kv, refused, chosen, ctx)
        if skipped > len(chosen) * most:
            raise RequestError(
                f"skip-depth: {self.active:.1%} active means skipping {skipped:.1f} of {len(units)}, and {len(chosen) * most:.3g} may be "
                "skipped",
                hint=f"raise active, or let more be skipped (blocks, keep-first, keep-last{', first' if most < 1 else ''})",
            )
        result = PassResult(refused=refused)
        shares = dict.fromkeys(chosen, skipped / max(len(chosen), 1))
        if self.blocks == "auto":
            candidates = [units[i] for i in chosen]
            found = curves(graph, candidates, ctx, windows=self.windows, rank=self._rank, experts=self.standin == "experts")
            shares = dict(zip(chosen, allocate(found, skipped, most=most), strict=True))
            result.facts["sensitivity"] = {u.name: round(curve.loss, 4) for u, curve in zip(candidates, found, strict=True)}
        graph.info["kv_bytes"] = sum(a.cache_bytes for a in regions.attentions)
        graph.info["skippable"] = graph.info.get("skippable", 0) + len(units)
        experts = self.standin == "experts"
        gated = [(insert_gates(graph, units[i], self._rank, kv[i], experts=experts), shares[i]) for i in chosen if shares[i] >= MIN_SHARE]
        result = self._fitted(graph, gated, ctx, result)
        if fresh and self._gates == "threshold":
            Recalibrate().run(graph, dataclasses.replace(ctx, calibration=dataclasses.replace(calibration, batches=fresh)))
        return result

    def _exits(
        self, graph: Graph, regions: Regions, units: list[Unit], kv: dict[int, KeysAndValues | None], refused: list[Refusal],
        exits: list[int], ctx: Context,
    ) -> PassResult:  # fmt: skip
        if self.blocks == "auto":
            exits = [i for i in dict.fromkeys((len(units) // 2, 3 * len(units) // 4)) if i in exits]
        skippable = [i for i in kv if i < len(units) - self.keep_last]
        found = segments(units, exits, skippable, (1 - self.active) * len(units))
        policies = [policy for policy in kv.values() if policy is not None]
        graph.info["kv_bytes"] = sum(a.cache_bytes for a in regions.attentions)
        graph.info["skippable"] = graph.info.get("skippable", 0) + len(units)
        gated: list[tuple[GatedUnit, float]] = []
        last = regions.blocks[-1].output
        for segment in found:
            inside = [p.attention for p in segment.unit.parts if p.attention is not None]
            own = [policy for policy in policies if policy.attention in inside]
            unit = insert_gates(graph, segment.unit, self._rank, own, after=gated[-1][0] if gated else None)
            gated.append((unit, segment.share))
        result = self._fitted(graph, gated, ctx, PassResult(refused=refused), last)
        for (unit, _), segment in zip(gated, found, strict=True):
            graph.info["depth"][unit.name]["units"] = segment.units
        return result

    def _fitted(
        self, graph: Graph, gated: list[tuple[GatedUnit, float]], ctx: Context, result: PassResult, last: fx.Node | None = None
    ) -> PassResult:
        """Fit what has gates, and note it.

        Args:
            last: the end of the residual stream, for predictors of what the layers up to there give.
        """
        with fast_matmul(), torch.no_grad():
            computed = self._fit(graph, gated, ctx.need_calibration(self.name).batches, ctx, result.facts, last)
        for unit, share in gated:
            result.changed += [p.name for p in unit.parts]
            attentions = [p.part.attention for p in unit.parts if p.part.attention is not None]
            graph.info.setdefault("depth", {})[unit.name] = {
                "what": self.what, "parts": [p.name for p in unit.parts], "skipped": share, "gates": self._gates, "rank": self._rank,
                **(self._kv_facts(attentions) if attentions else {}),
            }  # fmt: skip
        result.facts |= {"what": self.what, "active": self.active, "skipped": {u.name: round(s, 4) for u, s in gated}}
        if (size := kv_bytes(graph, computed)) is not None:
            result.facts["kv"] = {"policy": self.kv, "bytes_per_token": round(size.held, 1), "dense_bytes_per_token": size.dense}
        return result

    def _kv_facts(self, attentions: list[Attention]) -> dict[str, Any]:
        return {"kv": self.kv, "kv_bytes": sum(a.cache_bytes for a in attentions), "attentions": len(attentions)}

    @property
    def _gates(self) -> str:
        """What the graph has."""
        return "threshold" if self.predictor else self.gates

    def _kv(self, graph: Graph, regions: Regions, units: list[Unit], refused: list[Refusal]) -> dict[int, KeysAndValues | None]:
        """What becomes of the keys and values of each unit whose tokens can have it so, by position; the others are refused."""
        found: dict[int, KeysAndValues | None] = {}
        for index, unit in enumerate(units):
            attention = next((p.attention for p in unit.parts if p.attention is not None), None)
            kv = keys_and_values(graph, regions.attentions, attention, self.kv) if attention is not None else None
            if isinstance(kv, str):
                refused.append(Refusal(unit.name, "skip", f"kv={self.kv}: {kv}", "every token computes it; or use kv=compute"))
            else:
                found[index] = kv
        if self.blocks not in ("auto", "all", "alternate") and (lost := [i for i in self._chosen(len(units)) if i not in found]):
            reason = next(r.reason for r in refused if r.where == units[lost[0]].name)
            raise RequestError(f"skip-depth: {units[lost[0]].name} cannot be skipped: {reason}", hint="leave it out of blocks")
        return found

    @property
    def _rank(self) -> int:
        return self.rank if self.standin == "linear" else 0

    def _chosen(self, count: int) -> list[int]:
        """Positions of the units that may be skipped."""
        if self.blocks in ("auto", "all"):
            chosen = range(count)
        elif self.blocks == "alternate":
            chosen = range(1, count, 2)
        else:
            positions = [int(p) for p in self.blocks.split("+")]
            if any(not -count <= p < count for p in positions):
                raise RequestError(f"skip-depth: blocks={self.blocks}, and there are {count}", hint=f"positions are 0 to {count - 1}")
            chosen = sorted(p % count for p in positions)  # type: ignore[assignment]
        return [i for i in chosen if self.keep_first <= i < count - self.keep_last]

    # ---- fitting ---------------------------------------------------------------------------------------------------
    def _fit(
        self, graph: Graph, gated: list[tuple[GatedUnit, float]], batches: list[dict[str, Tensor]], ctx: Context, facts: dict[str, Any],
        last: fx.Node | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Fit routers and parts, in order; the fraction of the calibration tokens that are computed, by name of their gates."""
        computed: dict[str, float] = {}
        kept: list[Tensor] = []
        near: list[Tensor] = []
        sweep = Sweep(graph, batches)
        follow = Follow(ctx.dense, batches) if self.follow_dense > 0 and ctx.dense is not None else None
        exits = Exits(graph, batches, last, self.target) if last is not None else None
        for position, (unit, share) in enumerate(gated):
            for index, part in enumerate(unit.parts):
                # What the part gives may depend on other tokens' gates, and nodes may be added before the gates: the sweep stays there.
                again = index > 0 and part.part.attention is not None  # its queries are gated, and all tokens' are wanted
                alone = again or (index == 0 and (self.kv != "compute" or self._gates != "threshold"))
                x = sweep.advance(part.source)
                at_source = sweep.branch()
                ahead = sweep.branch() if alone else sweep
                if again:
                    ahead.provide(unit.gates, [torch.ones_like(gates) for gates in kept])
                    if unit.closed is not None:
                        ahead.provide(unit.closed, [torch.zeros_like(gates) for gates in kept])
                inputs = ahead.advance(part.inputs)
                streams = sweep.values(part.stream) if sweep.has(part.stream) else None
                wanted = follow.target(part, streams) if follow is not None and streams is not None else None
                if index == 0:
                    if exits is not None:
                        kept = exits.fit(unit, share, at_source, streams if streams is not None else x)
                        near = [gates == 0 for gates in kept]
                    else:
                        kept, near = self._fit_router(graph, unit, share, at_source, ahead, facts)
                    sweep.provide(unit.gates, kept)
                    if unit.closed is not None:
                        sweep.provide(unit.closed, [1 - gates for gates in kept])
                    computed[f"{unit.name}.depth"] = float(torch.cat([gates.flatten() for gates in kept]).mean())
                if alone:
                    inputs = [torch.where(g != 0, s, i) for g, s, i in zip(kept, sweep.advance(part.inputs), inputs, strict=True)]
                self._fit_part(part, x, inputs, wanted, kept, near)
                if part.routed is not None:
                    routing = routing_facts(graph, part.name)
                    left = 0.0 if part.shared is None else float(part.shared.mean())
                    routing["active"] = routing.get("active", 1.0) * (1 - share) + left * share
            ctx.progress(self.name, position + 1, len(gated))
        return computed

    def _fit_router(
        self, graph: Graph, unit: GatedUnit, share: float, at_source: Sweep, sweep: Sweep, facts: dict[str, Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Fit the router and set how its scores open gates.

        Returns:
            The gates [B, S, 1] it gives, a batch each; and which tokens the stand-in is for: those that skip, and some that come next.

        Args:
            at_source: has run up to what the router reads; ``sweep``: further, with open gates.
        """
        source = at_source.values(unit.source)
        errors = self._left_over(unit, sweep.branch())
        weight, bias = fit_scores(source, errors)
        scores = [x @ weight + bias for x in source]
        threshold = 0.0
        if self._gates == "threshold":
            best = [expert_choice(s + keep_first(s), 1 - share) for s in scores] if self.predictor else []
            if best:
                weight, bias = self._predict(source, best)
                scores = [x @ weight + bias for x in source]
            threshold = quantile(torch.cat([s[:, 1:].flatten() for s in scores]), share)
        elif self.gates == "sequence":
            threshold = quantile(torch.cat([s[:, : self.first].mean(1) for s in scores]).flatten(), share / self._most(scores[0]))
            unit.choose(graph, partial(sequence_scores._opoverload, first=self.first), keep_first=False)
        else:
            unit.choose(graph, partial(expert_choice, share=1 - share), keep_first=True)
        graph.add_tensor(unit.weight, weight.T.contiguous())
        graph.add_tensor(unit.bias, bias - threshold)
        kept = at_source.advance(unit.gates)
        near = [gates == 0 for gates in kept]
        if self._gates == "threshold":
            beyond = quantile(torch.cat([s[:, 1:].flatten() for s in scores]), min(NEAR * share, 1.0))
            near = [closed | ((s <= beyond) & (keep_first(s) == 0)) for closed, s in zip(near, scores, strict=True)]
        if self.predictor:
            right = sum(float((k == b).float().sum()) for k, b in zip(kept, best, strict=True)) / sum(b.numel() for b in best)
            facts.setdefault("predicted", {})[unit.name] = round(right, 4)
        return kept, near

    def _most(self, tokens: Tensor) -> float:
        """The largest share of a sequence, tokens [B, S, …], that may skip."""
        return max(1 - self.first / tokens.shape[1], 0.0) if self.gates == "sequence" else 1.0

    def _predict(self, source: list[Tensor], best: list[Tensor]) -> tuple[Tensor, Tensor]:
        """A linear map of each token alone to whether it is among the best of its sequence."""
        problem = LeastSquares(source[0].shape[-1], 1)
        for x, chosen in zip(source, best, strict=True):
            problem.add(x[:, 1:].flatten(0, 1), chosen[:, 1:].flatten(0, 1))
        return problem.solve(1e-2)

    def _left_over(self, unit: GatedUnit, sweep: Sweep) -> list[Tensor]:
        """Of each token [B, S], the energy that no stand-in gives it, relative to that of the residual stream; a batch each."""
        total: list[Tensor] = []
        energy: list[Tensor] = []
        for part in unit.parts:
            x, inputs = sweep.advance(part.source), sweep.advance(part.inputs)
            if not energy:
                streams = sweep.values(part.stream) if sweep.has(part.stream) else x
                energy = [s.square().sum(-1) for s in streams]
            given = _contributions(part, inputs)
            if part.shared is None:
                others = stand_in(x, given, x, self._rank)
            else:
                others = [part.of_experts(i.flatten(0, 1)).view_as(y) for i, y in zip(inputs, given, strict=True)]
            left = [y - s for y, s in zip(given, others, strict=True)]
            total = [t + y for t, y in zip(total, left, strict=True)] if total else left
        return [t.square().sum(-1) / e.clamp_min(1e-12) for t, e in zip(total, energy, strict=True)]

    def _fit_part(
        self, part: Gated, x: list[Tensor], inputs: list[Tensor], wanted: list[Tensor] | None, kept: list[Tensor], near: list[Tensor]
    ) -> None:
        weight, bias = part.projection()
        features = weight.shape[1]
        blend = self.follow_dense if wanted is not None else 0.0
        refit = LeastSquares(features, part.d_out)
        missing: list[Tensor] = []
        for index, gates in enumerate(kept):
            h, open_ = part.features(inputs[index].flatten(0, 1)), gates.flatten() != 0
            y = torch.nn.functional.linear(h, weight, bias)
            target = y if wanted is None else (1 - blend) * y + blend * wanted[index].flatten(0, 1)
            missing.append(target)
            if blend > 0 and part.refittable:
                refit.add(h[open_], (target - y)[open_])
        if refit.rows > MIN_ROWS:
            delta, _ = refit.solve(self.ridge)
            part.set_projection(weight + delta.T)
        if self._rank:
            problem = LeastSquares(x[0].shape[-1], part.d_out)
            for a, target, tokens in zip(x, missing, near, strict=True):
                chosen = tokens.flatten()
                problem.add(a.flatten(0, 1)[chosen], target[chosen] - part.constant)
            if problem.rows > MIN_ROWS:
                part.set_stand_in(*problem.solve_low_rank(STAND_IN_RIDGE, self.rank - 1))


def require_stand_in(who: str, standin: str, rank: int, *, experts: bool = False) -> None:
    """Raises:
    RequestError: there are no such stand-ins.
    """
    known = ("linear", "none", "experts") if experts else ("linear", "none")
    if standin not in known:
        raise RequestError(f"{who}: standin={standin} is not known", hint=f"use {', '.join(known[:-1])} or {known[-1]}")
    if rank and rank < 2:
        raise RequestError(f"{who}: a stand-in of rank {rank}", hint="rank is at least 2, or standin=none")


def usual_rank(units: Sequence[Unit]) -> int:
    """Of stand-ins of these, where none is asked for."""
    return max(2, min(RANK, min((int(u.source.meta["val"].shape[-1]) for u in units), default=RANK) // 4))


def keep_first(scores: Tensor) -> Tensor:
    """What is added to the scores [B, S, 1] of a sequence so that its first token is computed."""
    return (torch.arange(scores.shape[1]) == 0)[:, None] * ALWAYS


RANK = 128
NEAR = 1.5
"""A stand-in is fitted to so many times the tokens that skip, those first in their router's order: thresholds move, and a token that skips
then gets what it was not fitted to. A router of the first layer knows tokens by name: after healing, a step of .05 of its threshold brought
in a frequent one, and a KL of .119 became .159."""
MIN_SHARE = 0.01
"""Of tokens that skip, below which a layer gets no router: it would cost more than it spares."""
MIN_ROWS = 32
"""Tokens needed to fit anything to them."""


def find_units(graph: Graph, what: str) -> tuple[list[Unit], list[Refusal]]:
    """What tokens can skip together, in graph order, and what not."""
    return _units(graph, find_regions(graph), what)


def _units(graph: Graph, regions: Regions, what: str) -> tuple[list[Unit], list[Refusal]]:
    parts, refused = find_parts(regions.blocks, find_linears(graph))
    if what != "block":
        return [Unit((p,)) for p in parts if p.kind == what], refused
    units: list[Unit] = []
    for part in parts:
        if part.kind == "ffn" and units and len(units[-1].parts) == 1:
            units[-1] = Unit((*units[-1].parts, part))
        elif part.kind == "attention":
            units.append(Unit((part,)))
    return [u for u in units if len(u.parts) == 2], refused


def _contributions(part: Gated, inputs: list[Tensor]) -> list[Tensor]:
    """What the part gives every token, [B, S, d_out] a batch."""
    weight, bias = part.projection()
    return [torch.nn.functional.linear(part.features(i.flatten(0, 1)), weight, bias).unflatten(0, i.shape[:2]) for i in inputs]


class Follow:
    """The dense model's residual stream after each part, beside a sweep over the graph that is fitted."""

    def __init__(self, dense: Graph, batches: list[dict[str, Tensor]]) -> None:
        parts, _ = find_parts(find_regions(dense).blocks, find_linears(dense))
        self._added: dict[str, fx.Node | None] = {p.name: residual_add(p.result)[0] for p in parts}
        self._sweep = Sweep(dense, batches)

    def target(self, part: Gated, streams: list[Tensor]) -> list[Tensor] | None:
        """What the part would have to give for the stream after it to be the dense model's; None where it is not added directly."""
        added = self._added.get(part.name)
        if added is None or residual_add(part.result)[0] is None:
            return None
        return [t - s for t, s in zip(self._sweep.advance(added), streams, strict=True)]
