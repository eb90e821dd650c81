"""Quality of a converted model, always beside the dense one on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dyncomp.graph import Graph
from dyncomp.regions import find_routed
from dyncomp.sweep import Sweep

_POSITIONS = 128


@dataclass
class RoutingLoad:
    """How the experts of one routed FFN were used.

    Args:
        tokens: tokens seen.
        load: [E] fraction of the tokens that each expert ran for.
        active: mean fraction of the FFN's neurons that ran.
        none: fraction of tokens for which no expert ran.
    """

    tokens: int
    load: Tensor
    none: float

    @property
    def active(self) -> float:
        return float(self.load.mean())

    @property
    def unused(self) -> list[int]:
        """Experts that no token chose."""
        return (self.load == 0).nonzero().flatten().tolist()


@dataclass
class Quality:
    """Figures of one or several models on the same windows.

    Args:
        nll: model -> mean negative log-likelihood per token of each window [windows] (causal language models).
        kl: model -> mean KL(dense || model) per token, in nats.
        agreement: model -> fraction of tokens whose most likely next token is the dense model's.
        cosine: model -> mean cosine of the mean-pooled embedding to the dense model's (encoders).
        load: model -> expert use by routed FFN.
    """

    windows: int
    window_tokens: int
    nll: dict[str, Tensor] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    load: dict[str, dict[str, RoutingLoad]] = field(default_factory=dict)

    def perplexity(self, model: str) -> float:
        """exp of the mean negative log-likelihood over all tokens."""
        return math.exp(float(self.nll[model].double().mean()))

    def increase(self, model: str) -> float:
        """Relative rise of the perplexity over the dense model: 0.2 is +20 %."""
        return self.perplexity(model) / self.perplexity("dense") - 1

    def active_ffn(self, model: str, widths: dict[str, int], dense_width: int) -> float:
        """Mean active fraction over all FFN neurons, ``dense_width`` of which are in FFNs that were kept dense."""
        active = sum(widths[name] * use.active for name, use in self.load[model].items())
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
        task: ``causal-lm`` (perplexity, KL, next-token agreement) or ``encoder`` (cosine of mean-pooled embeddings).
        batch: windows at once.
    """
    quality = Quality(len(windows), windows.shape[1])
    nll: dict[str, list[Tensor]] = {name: [] for name in models}
    sums: dict[str, dict[str, float]] = {name: {"kl": 0.0, "agreement": 0.0, "cosine": 0.0} for name in models}
    gates: dict[str, dict[str, list[Tensor]]] = {name: {r.name: [] for r in find_routed(graph)} for name, graph in models.items()}
    with torch.no_grad():
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch]
            reference: Tensor | None = None
            for name in sorted(models, key=lambda n: n != "dense"):
                output = _run(models[name], ids, gates[name])
                if task == "causal-lm":
                    losses, kl, agreement = _compare(output, reference, ids)
                    nll[name].append(losses)
                    sums[name]["kl"] += kl
                    sums[name]["agreement"] += agreement
                    reference = output if reference is None else reference
                else:
                    pooled = F.normalize(output.float().mean(1), dim=-1)  # full windows: no padding to leave out
                    reference = pooled if reference is None else reference
                    sums[name]["cosine"] += float((pooled * reference).sum())
            if progress is not None:
                progress("evaluate", min(start + batch, len(windows)), len(windows))
    predicted = len(windows) * (windows.shape[1] - 1)
    for name in models:
        if task == "causal-lm":
            quality.nll[name] = torch.cat(nll[name])
            if name != "dense":
                quality.kl[name], quality.agreement[name] = sums[name]["kl"] / predicted, sums[name]["agreement"] / predicted
        elif name != "dense":
            quality.cosine[name] = sums[name]["cosine"] / len(windows)
        quality.load[name] = {region: _load(torch.cat(seen)) for region, seen in gates[name].items()}
    return quality


def _compare(logits: Tensor, reference: Tensor | None, ids: Tensor) -> tuple[Tensor, float, float]:
    """(mean negative log-likelihood of each window [B], sum of KL(reference || logits), tokens whose likeliest next token agrees).

    In pieces: the vocabulary makes these tensors larger than everything else in an evaluation.
    """
    losses, kl, agreement = [], 0.0, 0.0
    for start in range(0, ids.shape[1] - 1, _POSITIONS):
        piece = slice(start, min(start + _POSITIONS, ids.shape[1] - 1))
        logp = F.log_softmax(logits[:, piece].float(), -1)
        losses.append(-logp.gather(-1, ids[:, piece.start + 1 : piece.stop + 1, None]).squeeze(-1))
        if reference is not None:
            expected = F.log_softmax(reference[:, piece].float(), -1)
            kl += float(F.kl_div(logp, expected, log_target=True, reduction="sum"))
            agreement += float((logp.argmax(-1) == expected.argmax(-1)).sum())
    return torch.cat(losses, 1).mean(1), kl, agreement


def _run(graph: Graph, ids: Tensor, gates: dict[str, list[Tensor]]) -> Tensor:
    """One batch through the graph, the gates of every routed FFN noted on the way."""
    inputs: dict[str, Any] = model_inputs(graph, ids)
    if not gates:
        return graph(**inputs)

    def note(seen: list[Tensor]) -> Callable[[int, Tensor], None]:
        return lambda _, value: seen.append((value != 0).flatten(0, -2))

    watch = {r.gates: note(gates[r.name]) for r in find_routed(graph)}
    return Sweep(graph, [inputs]).advance(graph.output_nodes[0], watch=watch)[0]


def model_inputs(graph: Graph, ids: Tensor) -> dict[str, Tensor]:
    """The graph's inputs for full windows of token ids: masks of ones, token types of zeros."""
    known = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {spec.name: known[spec.name] for spec in graph.inputs}


def batches(graph: Graph, windows: Tensor, *, batch: int = 4) -> list[dict[str, Tensor]]:
    """Windows as graph inputs, ``batch`` at a time."""
    return [model_inputs(graph, ids) for ids in windows.split(batch)]


def _load(active: Tensor) -> RoutingLoad:
    return RoutingLoad(len(active), active.float().mean(0), float((~active.any(1)).float().mean()))


def load_summary(loads: Sequence[RoutingLoad]) -> dict[str, float]:
    """Figures over all routed FFNs: mean active fraction, least and most used expert, tokens with no expert."""
    every = torch.cat([use.load for use in loads])
    return {
        "active": float(torch.stack([use.load.mean() for use in loads]).mean()),
        "least_used": float(every.min()),
        "most_used": float(every.max()),
        "no_expert": max(use.none for use in loads),
        "unused_experts": float((every == 0).sum()),
    }
