"""Calibration: what the dense model's FFNs do on real text, in one streamed pass.

Layer by layer (:mod:`dyncomp.sweep`), each FFN's hidden activations are seen once, batch by batch, and reduced to sums.
Memory is bounded by ``2 * tokens * d_model * 4`` bytes for the tensors alive between two layers, one batch's activations,
and ``d_ff * PROJECTION * 4`` bytes a layer of statistics; it does not grow with the number of layers beyond the latter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dyncomp.graph import Graph
from dyncomp.regions import FFN
from dyncomp.sweep import Sweep, fast_matmul
from dyncomp.whole import replacing

PROJECTION = 384
"""Columns of the random projection that stands for the tokens in co-activation features."""
TOKENS = 16_384
"""Statistics are taken over at most this many of the calibration tokens: which neurons fire together shows early. (Routers
and refits, which are regressions, use as many as :func:`~dyncomp.passes.least_squares.enough_tokens` says.)"""
UNFITTED = 16_384
"""Tokens that thresholds are set on. Documents differ: of SmolLM2's windows of 512 tokens, with 12.5 % of the visits skipped, what one
skips has a standard deviation of 1.8 points. With 75 % of 96 experts active, thresholds from eight windows had 71.8 to 74.7 % active on
other text, with a KL of .183 to .154."""
MARKED = 0.1
"""Fraction of neurons marked per token: the ones with the largest |activation| (ATopK of CMoE, 2502.04416, section 4.1)."""


@dataclass
class FFNStatistics:
    """What one FFN's hidden activations h: [tokens, F] were like.

    Args:
        mean, square: [F] mean of h and of h².
        rate: [F] fraction of tokens that mark the neuron (its |h| is among the largest :data:`MARKED` of that token).
        features: [F, PROJECTION] the markers over the tokens, times a random Gaussian matrix / sqrt(PROJECTION): inner
            products of rows approximate co-activation counts (Johnson-Lindenstrauss).
    """

    mean: Tensor
    square: Tensor
    rate: Tensor
    features: Tensor


@dataclass
class Calibration:
    """Calibration inputs and the dense model's statistics on them.

    Args:
        batches: graph inputs by name, full windows or images.
        statistics: by FFN name.
        fingerprint: of model and inputs; statistics are reused only when it matches.
        example_tokens: that the model makes of one example; None where the inputs are tokens.
    """

    batches: list[dict[str, Tensor]]
    fingerprint: str
    statistics: dict[str, FFNStatistics] = field(default_factory=dict)
    example_tokens: int | None = None

    @property
    def tokens(self) -> int:
        return sum(map(self._count, self.batches))

    def _count(self, batch: dict[str, Tensor]) -> int:
        """Of an encoder–decoder what the shorter side has: as many as every layer sees."""
        if self.example_tokens is not None:
            return len(next(iter(batch.values()))) * self.example_tokens
        return min(ids.numel() for ids in batch.values())

    def first(self, tokens: int) -> list[dict[str, Tensor]]:
        """The first batches, as many as hold ``tokens`` tokens."""
        chosen, seen = [], 0
        for batch in self.batches:
            if seen >= tokens:
                break
            chosen.append(batch)
            seen += self._count(batch)
        return chosen

    def unfitted(self, fitted: int = 0, tokens: int = UNFITTED) -> list[dict[str, Tensor]]:
        """Batches to set thresholds on, as many as hold ``tokens`` tokens: those after the first ``fitted`` tokens, or what there is.

        What is fitted to a text gives there what it gives on no other: thresholds from that text keep fewer gates open elsewhere.
        """
        return replace(self, batches=self.batches[len(self.first(fitted)) :]).first(tokens)

    def windows(self) -> list[dict[str, Tensor]]:
        """Every window or image as a batch of its own."""
        return [{name: value[i : i + 1] for name, value in b.items()} for b in self.batches for i in range(len(next(iter(b.values()))))]

    def save(self, file: Path) -> None:
        """Write the statistics as safetensors, atomically."""
        tensors = {f"{name}/{f.name}": getattr(s, f.name) for name, s in self.statistics.items() for f in fields(s)}
        with replacing(file) as part:
            save_file(tensors, str(part), {"fingerprint": self.fingerprint})

    def load(self, file: Path) -> bool:
        """Take over the statistics in ``file`` if they belong to this model and these inputs; says whether they did.
        A damaged file counts as absent: it is a cache."""
        try:
            with safe_open(str(file), framework="pt") as data:
                if (data.metadata() or {}).get("fingerprint") != self.fingerprint:
                    return False
                names = sorted({key.rsplit("/", 1)[0] for key in data.keys()})  # noqa: SIM118
                self.statistics |= {
                    n: FFNStatistics(**{f.name: data.get_tensor(f"{n}/{f.name}") for f in fields(FFNStatistics)}) for n in names
                }
        except (OSError, SafetensorError):
            return False
        return True


def fingerprint(model: str, batches: Sequence[dict[str, Tensor]]) -> str:
    """Hash of the model's fingerprint and the exact inputs."""
    digest = hashlib.sha256(model.encode())
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def calibrate(
    graph: Graph,
    ffns: Sequence[FFN],
    calibration: Calibration,
    *,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Fill ``calibration.statistics`` for ``ffns``.

    Args:
        cache: a file that is reused when it fits, continued when it is incomplete, and written after every few layers:
            an interrupted run loses at most the layers since.
        progress: called with ("calibrate", batches done, batches in all).
    """
    if cache is not None:
        calibration.load(cache)
    batches = calibration.first(TOKENS)
    missing = [f for f in ffns if f.name not in calibration.statistics]
    if not missing:
        return
    total, done = len(missing) * len(batches), 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("calibrate", min(done, total), total)

    sweep = Sweep(graph, batches)
    with fast_matmul():
        for position, ffn in enumerate(missing):
            accumulate = Accumulator(ffn.d_ff)
            sweep.advance(ffn.output, watch={ffn.down.input: accumulate.watcher(ffn.down.axis)}, tick=tick)
            calibration.statistics[ffn.name] = accumulate.result()
            if cache is not None and (position % 8 == 7 or ffn is missing[-1]):
                calibration.save(cache)


class Accumulator:
    """Sums over tokens, on the run."""

    def __init__(self, neurons: int) -> None:
        self.count = 0
        self.mean = torch.zeros(neurons, dtype=torch.float64)
        self.square = torch.zeros(neurons, dtype=torch.float64)
        self.rate = torch.zeros(neurons, dtype=torch.float64)
        self.features = torch.zeros(neurons, PROJECTION)

    def watcher(self, axis: int) -> Callable[[int, Tensor], None]:
        """For :meth:`Sweep.advance`: adds a batch's activations, whose features are on ``axis``."""
        return lambda index, hidden: self.add(index, hidden.movedim(axis, -1))

    @torch.no_grad()
    def add(self, index: int, hidden: Tensor) -> None:
        h = hidden.reshape(-1, hidden.shape[-1]).float()
        marks = max(1, round(MARKED * h.shape[1]))
        marked = torch.zeros_like(h).scatter_(1, h.abs().topk(marks, dim=1, sorted=False).indices, 1.0)
        # The projection's rows belong to tokens: seeded per batch, they need not be kept.
        projection = torch.randn(h.shape[0], PROJECTION, generator=torch.Generator().manual_seed(index)) / PROJECTION**0.5
        self.features += marked.T @ projection
        self.rate += marked.sum(0)
        self.mean += h.sum(0)
        self.square += h.square().sum(0)
        self.count += h.shape[0]

    def result(self) -> FFNStatistics:
        n = self.count
        return FFNStatistics((self.mean / n).float(), (self.square / n).float(), (self.rate / n).float(), self.features)
