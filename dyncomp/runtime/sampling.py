"""From logits to a token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dyncomp.errors import RequestError
from dyncomp.runtime.session import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop.

    Args:
        max_tokens: the most tokens to generate.
        temperature: 0 takes the likeliest token (greedy); otherwise logits are divided by it.
        top_k: only the k likeliest tokens; 0 means all.
        top_p: only the likeliest tokens that together have this probability (nucleus sampling, 1904.09751); 1 means all.
        seed: the same seed gives the same text for the same place in a batch.
        stop: generation ends before any of these strings.

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, "max_tokens is at least 1"),
            (self.temperature >= 0, "temperature is at least 0"),
            (self.top_k >= 0, "top_k is at least 0"),
            (0 < self.top_p <= 1, "top_p is above 0 and at most 1"),
            (all(self.stop), "a stop string is not empty"),
        ]
        for good, rule in checks:
            if not good:
                raise RequestError(f"cannot sample so: {rule}")


class Sampler:
    """Chooses the next token of one sequence; has its own random numbers."""

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, row])

    def choose(self, logits: Array) -> int:
        """The next token for logits [V]."""
        s = self._sampling
        if s.temperature == 0:
            return int(logits.argmax())
        scores = logits.astype(np.float64) / s.temperature
        if s.top_k or s.top_p < 1:
            order = np.argsort(-scores, kind="stable")
            order = order[: s.top_k] if s.top_k else order
        else:  # sorting a vocabulary takes as long as a step of a small model
            order = np.arange(len(scores))
        total = np.exp(scores[order] - scores.max()).cumsum()
        if s.top_p < 1:
            keep = int(np.searchsorted(total, s.top_p * total[-1])) + 1
            order, total = order[:keep], total[:keep]
        return int(order[np.searchsorted(total, self._random.random() * total[-1], side="right").clip(max=len(order) - 1)])
