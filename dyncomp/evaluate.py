"""Quality of a converted model, always beside the dense one on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dyncomp.bootstrap import interval
from dyncomp.graph import Graph
from dyncomp.regions import RoutedFFN, find_routed
from dyncomp.regions.depth import Skip, find_skips
from dyncomp.routing import spread
from dyncomp.sweep import Sweep

_POSITIONS = 128
COLLAPSED = 0.05
NEIGHBOURS, PASSAGE = 10, 32
"""Of how many nearest neighbours retrieval agreement is counted, among passages of how many tokens."""


@dataclass
class RoutingLoad:
    """How the experts of one routed FFN were used.

    Args:
        tokens: tokens seen.
        load: [E] fraction of the tokens that each expert ran for.
        active: mean fraction of the FFN's neurons that ran.
        none: fraction of tokens for which no expert ran.
        shared: how many experts, the first ones, every token runs by design.
    """

    tokens: int
    load: Tensor
    none: float
    shared: int = 0

    @property
    def active(self) -> float:
        return float(self.load.mean())

    @property
    def unused(self) -> list[int]:
        """Experts that no token chose."""
        return (self.load == 0).nonzero().flatten().tolist()

    @property
    def spread(self) -> float:
        """How much the choice depends on the token: see :func:`dyncomp.routing.spread`. Not above :data:`COLLAPSED`: the router's choice
        is next to the same for every token, and static pruning would do."""
        return spread(self.load[self.shared :])


@dataclass
class Quality:
    """Figures of one or several models on the same windows.

    Args:
        nll: model -> mean negative log-likelihood per token of each window [windows] (causal language models).
        kl: model -> mean KL(dense || model) per token, in nats.
        agreement: model -> fraction of tokens whose most likely next token is the dense model's.
        cosine: model -> mean cosine of the mean-pooled embedding to the dense model's (encoders).
        retrieval: model -> mean share of a passage's :data:`NEIGHBOURS` nearest passages that it has in common with the dense model
            (encoders).
        by_item: figure (``kl``, ``agreement``, ``cosine`` by window, ``retrieval`` by passage) -> model -> its value for each [items].
        load: model -> expert use by routed FFN.
        computed: model -> fraction of the tokens that did not skip, by gate.
    """

    windows: int
    window_tokens: int
    nll: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    retrieval: dict[str, float] = field(default_factory=dict)
    by_item: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    load: dict[str, dict[str, RoutingLoad]] = field(default_factory=dict)
    computed: dict[str, dict[str, float]] = field(default_factory=dict)

    def perplexity(self, model: str) -> float:
        """exp of the mean negative log-likelihood over all tokens."""
        return math.exp(float(self.nll[model].double().mean()))

    def increase(self, model: str) -> float:
        """Relative rise of the perplexity over the dense model: 0.2 is +20 %."""
        return self.perplexity(model) / self.perplexity("dense") - 1

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """Figure -> model -> [low, high] (see :mod:`dyncomp.bootstrap`); ``increase`` is paired with the dense model by window."""
        found: dict[str, dict[str, list[float] | None]] = {
            "increase": {m: interval(v - self.nll["dense"], exponential=True) for m, v in self.nll.items() if m != "dense"}
        }
        found |= {figure: {m: interval(v) for m, v in models.items()} for figure, models in self.by_item.items()}
        return {f: kept for f, models in found.items() if (kept := {m: v for m, v in models.items() if v is not None})}

    def active_ffn(self, model: str, widths: dict[str, int], dense_width: int) -> float:
        """Mean active fraction over all FFN neurons, ``dense_width`` of which are in FFNs that were kept dense."""
        active = sum(width * self.load[model][name].active for name, width in widths.items())
        return (active + dense_width) / (sum(widths.values()) + dense_width)


def evaluate(
    models: dict[str, Graph],
    windows: Tensor,
    *,
    task: str,
    batch: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quality:
    """Run every model on the same windows.

    Args:
        models: by name; ``"dense"`` is the reference.
        windows: [n, length] token ids.
        task: ``causal-lm`` (perplexity, KL, next-token agreement) or ``encoder`` (cosine of mean-pooled embeddings, agreement on
            which passages are alike).
        batch: windows at once.
    """
    quality = Quality(len(windows), windows.shape[1])
    nll: dict[str, list[Tensor]] = {name: [] for name in models}
    seen: dict[str, dict[str, list[Tensor]]] = {figure: {name: [] for name in models} for figure in ("kl", "agreement", "cosine")}
    runs = {name: _Run(graph, windows.split(batch)) for name, graph in models.items()}
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch]
            expected: _Reference | None = None
            reference: Tensor | None = None
            for name in sorted(models, key=lambda n: n != "dense"):
                output = next(runs[name].outputs)
                if task == "causal-lm":
                    predicted = _Predictions(output)
                    nll[name].append(predicted.losses(ids))
                    if expected is not None:
                        seen["kl"][name].append(expected.divergence(predicted))
                        seen["agreement"][name].append(expected.agreement(predicted))
                    expected = _Reference(predicted) if expected is None else expected
                else:
                    pooled = _pooled(output)
                    if reference is not None:
                        seen["cosine"][name].append((pooled * reference).sum(-1))
                    reference = pooled if reference is None else reference
            if progress is not None:
                progress("evaluate", min(start + batch, len(windows)), len(windows))
        if task != "causal-lm" and "dense" in models:
            quality.by_item["retrieval"] = _retrieval(models, windows)
    quality.nll = {name: torch.cat(values) for name, values in nll.items() if values}
    quality.by_item |= {f: kept for f, values in seen.items() if (kept := {m: torch.cat(v) for m, v in values.items() if v})}
    for figure, values in quality.by_item.items():
        setattr(quality, figure, {name: float(v.double().mean()) for name, v in values.items()})
    for name in models:
        skips = {s.name for s in find_skips(models[name])}
        facts = models[name].info.get("routing", {})
        loads = {region: _load(torch.cat(found), facts.get(region, {}).get("shared", 0)) for region, found in runs[name].gates.items()}
        quality.load[name] = {region: load for region, load in loads.items() if region not in skips}
        quality.computed[name] = {region: load.active for region, load in loads.items() if region in skips}
    return quality


class _Predictions:
    """What logits [B, S, V] say of the tokens that follow, for all positions but the last.

    In pieces: the vocabulary makes these tensors larger than everything else in an evaluation.
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits[:, :-1].float()
        pieces = [(piece.logsumexp(-1), piece.argmax(-1)) for piece in self.logits.split(_POSITIONS, 1)]
        self.normalizer, self.likeliest = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))

    def losses(self, ids: Tensor) -> Tensor:
        """Mean negative log-likelihood of each window [B]."""
        chosen = self.logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        return (self.normalizer - chosen).mean(1)


class _Reference:
    """Predictions that others are held against; takes their logits over."""

    def __init__(self, predicted: _Predictions) -> None:
        self.likeliest, self._normalizer = predicted.likeliest, predicted.normalizer
        self._probabilities = (predicted.logits - predicted.normalizer[..., None]).exp_()
        self._expected = _dot(self._probabilities, predicted.logits)

    def divergence(self, other: _Predictions) -> Tensor:
        """Mean KL(self || other) of each window [B]: the expected difference of the logits less that of the normalizers."""
        difference = self._expected - _dot(self._probabilities, other.logits)
        return (difference - self._normalizer + other.normalizer).mean(1).clamp_min(0)

    def agreement(self, other: _Predictions) -> Tensor:
        """Share of each window's tokens [B] after which both find the same token likeliest."""
        return (self.likeliest == other.likeliest).float().mean(1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[B, S, V], [B, S, V] -> [B, S]; unlike ``torch.linalg.vecdot`` without a third tensor of that size."""
    return (a.unsqueeze(-2) @ b.unsqueeze(-1)).flatten(-3)


def _pooled(output: Tensor) -> Tensor:
    """Mean-pooled unit embeddings: [B, S, d] -> [B, d]; of full windows, so that there is no padding to leave out."""
    return F.normalize(output.float().mean(1), dim=-1)


def _retrieval(models: dict[str, Graph], windows: Tensor) -> dict[str, Tensor]:
    """For each model but the dense one: the share of every passage's nearest neighbours that the dense model gives it too [passages]."""
    ids = _passages(windows)
    neighbours = {}
    count = min(NEIGHBOURS, len(ids) // 3)
    if count < 1:
        return {}
    for name, graph in models.items():
        embedded = torch.cat([_pooled(graph(**model_inputs(graph, part))) for part in ids.split(16)])
        likeness = (embedded @ embedded.T).fill_diagonal_(-2.0)
        neighbours[name] = torch.zeros_like(likeness).scatter_(1, likeness.topk(count, dim=1).indices, 1.0)
    return {name: (found * neighbours["dense"]).sum(1) / count for name, found in neighbours.items() if name != "dense"}


def _passages(windows: Tensor) -> Tensor:
    """Windows cut into passages of :data:`PASSAGE` tokens; the first and last token are repeated where every window has the same."""
    framed = windows.shape[1] > 4 and bool((windows[:, [0, -1]] == windows[:1, [0, -1]]).all())
    body = windows[:, 1:-1] if framed else windows
    length = min(PASSAGE - 2 * framed, body.shape[1])
    parts = body[:, : body.shape[1] // length * length].reshape(-1, length)
    if not framed:
        return parts
    ends = windows[:1, [0, -1]].expand(len(parts), 2)
    return torch.cat([ends[:, :1], parts, ends[:, 1:]], 1)


class _Run:
    """Runs one model, batch after batch as :attr:`outputs` are asked for, and notes the gates of every routed FFN and skip on the way."""

    def __init__(self, graph: Graph, batches: Sequence[Tensor]) -> None:
        noted: dict[fx.Node, list[Tensor]] = {}
        self.gates = {region.name: noted.setdefault(region.gates, []) for region in _gated(graph)}

        def note(seen: list[Tensor]) -> Callable[[int, Tensor], None]:
            return lambda _, value: seen.append((value != 0).flatten(0, -2))

        sweep = Sweep(graph, [model_inputs(graph, ids) for ids in batches])
        self.outputs = sweep.each(graph.output_nodes[0], watch={node: note(seen) for node, seen in noted.items()})


def model_inputs(graph: Graph, ids: Tensor) -> dict[str, Tensor]:
    """The graph's inputs for full windows of token ids: masks of ones, token types of zeros."""
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {spec.name: known[spec.name] for spec in graph.inputs}


def batches(graph: Graph, windows: Tensor, *, batch: int = 4) -> list[dict[str, Tensor]]:
    """Windows as graph inputs, ``batch`` at a time."""
    return [model_inputs(graph, ids) for ids in windows.split(batch)]


def _gated(graph: Graph) -> list[RoutedFFN | Skip]:
    """What has gates."""
    return [*find_routed(graph), *find_skips(graph)]


def _load(active: Tensor, shared: int) -> RoutingLoad:
    return RoutingLoad(len(active), active.float().mean(0), float((~active.any(1)).float().mean()), shared)


def load_summary(loads: Sequence[RoutingLoad]) -> dict[str, float]:
    """Figures over all routed FFNs: mean active fraction, least and most used expert, tokens with no expert, collapsed routers."""
    every = torch.cat([use.load for use in loads])
    return {
        "active": float(torch.stack([use.load.mean() for use in loads]).mean()),
        "least_used": float(every.min()),
        "most_used": float(every.max()),
        "no_expert": max(use.none for use in loads),
        "unused_experts": float((every == 0).sum()),
        "spread": min(use.spread for use in loads),
        "collapsed": float(sum(use.spread <= COLLAPSED for use in loads)),
    }
