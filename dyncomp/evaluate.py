"""Quality of a converted model, always beside the dense one on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from dyncomp.bootstrap import interval
from dyncomp.errors import RequestError
from dyncomp.examples import Examples, example_tokens
from dyncomp.graph import Graph
from dyncomp.models.loaded import WRITES
from dyncomp.probe import probe
from dyncomp.regions import RoutedFFN, find_routed
from dyncomp.regions.class_token import has_class_token
from dyncomp.regions.depth import Skip, find_skips
from dyncomp.regions.tokens import token_input, written_tokens
from dyncomp.routing import spread
from dyncomp.rows import Rows, is_pairs, read_of, row_lengths, shortened, split_rows, tensors_of, written_lengths, written_of
from dyncomp.sweep import Sweep

_POSITIONS = 128
COLLAPSED = 0.05
NEIGHBOURS, PASSAGE = 10, 32
"""Of how many nearest neighbours retrieval agreement is counted, among images or passages of how many tokens."""


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
    """Figures of one or several models on the same windows of tokens, or images.

    Args:
        nll: model -> mean negative log-likelihood per token of each window [windows] (models that write tokens). Of pairs of several
            lengths, these and what else is a mean over tokens are weighted by the length, so that their mean is that over all tokens.
        kl: model -> mean KL(dense || model) per token, in nats.
        agreement: model -> fraction of tokens whose most likely next token is the dense model's.
        cosine: model -> mean cosine of the embedding (see :func:`embedding`) to the dense model's (encoders).
        retrieval: model -> mean share of a passage's or image's :data:`NEIGHBOURS` nearest ones that it has in common with the dense
            model (encoders).
        probe: model -> accuracy of a linear probe of its embeddings (encoders, where examples have labels).
        probe_dense: model -> accuracy of the dense model's linear probe on its embeddings: of a classifier that is not fitted again.
        wer: model -> word error rate of what it writes, greedily (of recordings; see :mod:`dyncomp.transcribe`).
        by_item: figure (``kl``, ``agreement``, ``cosine`` by window or image, ``retrieval`` by passage or image, probes by image) ->
            model -> its value for each [items].
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
    probe: dict[str, float] = field(default_factory=dict)
    probe_dense: dict[str, float] = field(default_factory=dict)
    wer: dict[str, float] = field(default_factory=dict)
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
        """Figure -> model -> [low, high] (see :mod:`dyncomp.bootstrap`); ``increase``, ``wer_change`` and ``probe_change`` are
        paired with the dense model by item."""
        found: dict[str, dict[str, list[float] | None]] = {
            "increase": {m: interval(v - self.nll["dense"], exponential=True) for m, v in self.nll.items() if m != "dense"}
        }
        for figure in ("probe", "wer"):
            if known := self.by_item.get(figure):
                found[f"{figure}_change"] = {m: interval(v - known["dense"]) for m, v in known.items() if m != "dense"}
        found |= {figure: {m: interval(v) for m, v in models.items()} for figure, models in self.by_item.items()}
        return {f: kept for f, models in found.items() if (kept := {m: v for m, v in models.items() if v is not None})}

    def active_ffn(self, model: str, widths: dict[str, int], dense_width: int) -> float:
        """Mean active fraction over all FFN neurons, ``dense_width`` of which are in FFNs that were kept dense."""
        active = sum(width * self.load[model][name].active for name, width in widths.items())
        return (active + dense_width) / (sum(widths.values()) + dense_width)


def evaluate(
    models: dict[str, Graph],
    examples: Examples | Rows,
    *,
    task: str,
    batch: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> Quality:
    """Run every model on the same examples.

    Args:
        models: by name; ``"dense"`` is the reference.
        examples: token ids [n, length], pairs of them, images, with or without labels; a tensor is examples without labels.
        task: ``causal-lm`` (perplexity, KL, next-token agreement), ``seq2seq`` (the same of what is written, given what is read and the
            right tokens before it) or an encoder's (cosine of embeddings, agreement on what is alike, linear probes where there are
            labels).
        batch: examples at once.
    """
    examples = examples if isinstance(examples, Examples) else Examples(examples)
    rows, writes = examples.rows, task in WRITES
    parts = split_rows(rows, batch)
    lengths = row_lengths(rows)
    quality = Quality(len(rows), round(float(lengths.double().mean())))
    nll: dict[str, list[Tensor]] = {name: [] for name in models}
    seen: dict[str, dict[str, list[Tensor]]] = {figure: {name: [] for name in models} for figure in ("kl", "agreement", "cosine")}
    embedded: dict[str, list[Tensor]] = {name: [] for name in models}
    runs = {name: _Run(graph, parts) for name, graph in models.items()}
    done = 0
    with torch.no_grad():
        for part in parts:
            weight = row_lengths(part)[0] / lengths.double().mean() if is_pairs(rows) else 1.0
            expected: _Reference | None = None
            for name in sorted(models, key=lambda n: n != "dense"):
                output = next(runs[name].outputs)
                if writes:
                    graph = models[name]
                    given = max(len(graph.info.get("begin", ())) - 1, 0)  # of these tokens, all but the first are no predictions
                    predicted = _Predictions(output[:, given:])
                    nll[name].append(weight * predicted.losses(written_tokens(graph, model_inputs(graph, part))[:, given:]))
                    if expected is not None:
                        seen["kl"][name].append(weight * expected.divergence(predicted))
                        seen["agreement"][name].append(weight * expected.agreement(predicted))
                    expected = _Reference(predicted) if expected is None else expected
                else:
                    embedded[name].append(runs[name].embedding(output))
            done += len(part)
            if progress is not None:
                progress("evaluate", done, len(rows))
        if not writes:
            _compare(quality, models, {name: torch.cat(values) for name, values in embedded.items()}, examples)
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


def _compare(quality: Quality, models: dict[str, Graph], embedded: dict[str, Tensor], examples: Examples) -> None:
    """Figures of unit embeddings [n, d] beside the dense model's."""
    if "dense" not in embedded:
        return
    others = [name for name in embedded if name != "dense"]
    quality.by_item["cosine"] = {name: (embedded[name] * embedded["dense"]).sum(-1) for name in others}
    if tensors_of(examples.rows)[0].is_floating_point():
        quality.window_tokens = example_tokens(models["dense"]) or 1
        items = embedded
    else:
        passages = _passages(read_of(examples.rows))
        items = {n: torch.cat([embedding(g, g(**model_inputs(g, part))) for part in passages.split(16)]) for n, g in models.items()}
    quality.by_item["retrieval"] = _retrieval(items)
    if examples.labels is not None:
        quality.by_item["probe"] = {n: probe(v, v, examples.labels) for n, v in embedded.items()}
        quality.by_item["probe_dense"] = {n: probe(embedded["dense"], embedded[n], examples.labels) for n in others}


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


def embedding(graph: Graph, output: Tensor, *, first: bool | None = None) -> Tensor:
    """Unit embeddings [B, d] of what a graph gives [B, S, d] for full windows or images (no padding to leave out).

    The class token of an image encoder that has one, else the mean over tokens; an output [B, d] is one already.

    Args:
        first: whether it is the first token, if that is known already.
    """
    if output.dim() == 2:
        return F.normalize(output.float(), dim=-1)
    if output.dim() != 3:
        raise RequestError(
            f"an output of {output.dim()} dimensions holds no embedding of each example", hint="evaluation needs [B, S, d] or [B, d]"
        )
    first = class_token_counts(graph) if first is None else first
    return F.normalize(output[:, 0].float() if first else output.float().mean(1), dim=-1)


def class_token_counts(graph: Graph) -> bool:
    """Whether the embedding is the first token's: of image encoders with a class token."""
    return graph.inputs[0].dtype.is_floating_point and has_class_token(graph)


def _retrieval(embedded: dict[str, Tensor]) -> dict[str, Tensor]:
    """For each model but the dense one: the share of every item's nearest neighbours that the dense model gives it too [items]."""
    neighbours = {}
    count = min(NEIGHBOURS, len(embedded["dense"]) // 3)
    if count < 1:
        return {}
    for name, vectors in embedded.items():
        likeness = (vectors @ vectors.T).fill_diagonal_(-2.0)
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

    def __init__(self, graph: Graph, parts: Sequence[Rows]) -> None:
        noted: dict[fx.Node, list[Tensor]] = {}
        self.gates = {region.name: noted.setdefault(region.gates, []) for region in _gated(graph)}
        self._graph, self._first = graph, class_token_counts(graph)

        def note(seen: list[Tensor]) -> Callable[[int, Tensor], None]:
            return lambda _, value: seen.append((value != 0).flatten(0, -2))

        sweep = Sweep(graph, [model_inputs(graph, part) for part in parts])
        self.outputs = sweep.each(graph.output_nodes[0], watch={node: note(seen) for node, seen in noted.items()})

    def embedding(self, output: Tensor) -> Tensor:
        return embedding(self._graph, output, first=self._first)


def model_inputs(graph: Graph, rows: Rows) -> dict[str, Tensor]:
    """The graph's inputs for rows of its main one, the first: full windows of token ids, images. Masks are of ones, token types of zeros.

    Of pairs, which must have the same lengths, the decoder takes what is written after ``graph.info["begin"]``.

    Raises:
        RequestError: the graph takes something else besides.
    """
    decoder: dict[str, Tensor] = {}
    read: Tensor = read_of(rows)
    if is_pairs(rows):
        begin, wrote = torch.tensor(graph.info.get("begin", ()), dtype=torch.int64), int(written_lengths(rows)[0])
        decoder[graph.inputs[token_input(graph) or 0].name] = torch.cat([begin.expand(len(rows), -1), written_of(rows)[:, :wrote]], 1)
    main, *rest = (spec for spec in graph.inputs if spec.name not in decoder)
    known = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    if unknown := [spec.name for spec in rest if spec.name not in known]:
        raise RequestError(
            f"the model takes {', '.join(unknown)} besides {main.name}: calibration and evaluation run models of one input",
            hint="write a factory (module:function) whose module takes one",
        )
    return {main.name: read} | {spec.name: known[spec.name](read) for spec in rest} | decoder


def batches(graph: Graph, rows: Rows, *, batch: int = 4) -> list[dict[str, Tensor]]:
    """Rows as graph inputs, at most ``batch`` at a time."""
    return [model_inputs(graph, part) for part in split_rows(rows, batch)]


def glimpse(graph: Graph, rows: Rows) -> dict[str, Tensor]:
    """The least that says whether two graphs compute the same: an image, a recording, or the beginning of a window."""
    return model_inputs(graph, shortened(rows[:1], 64))


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
