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
    """Chooses the next token of one sequence; has its own random numbers.

    A vocabulary is long beside a step of a small model: probabilities are float32, and where only the likeliest tokens count, no more
    than the values of those that may be among them are sorted.
    """

    def __init__(self, sampling: Sampling, row: int = 0) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng([sampling.seed, row])

    def choose(self, logits: Array) -> int:
        """The next token for logits [V]."""
        s = self._sampling
        if s.temperature == 0:
            return int(logits.argmax())
        tokens: list[Array] = []  # what is left of the vocabulary, each among those before
        if 0 < s.top_k < len(logits):
            tokens.append(_largest(logits, np.partition(logits, -s.top_k)[-s.top_k], s.top_k))
            logits = logits[tokens[-1]]
        scores = logits.astype(np.float32)
        scores -= scores.max()
        scores /= s.temperature
        weights = np.exp(scores, out=scores)  # of the likeliest token 1
        if s.top_p < 1:
            tokens.append(_nucleus(weights, s.top_p))
            weights = weights[tokens[-1]]
        chosen = _reaching(weights, self._random.random(), beyond=True)
        for kept in reversed(tokens):
            chosen = int(kept[chosen])
        return chosen


def _nucleus(weights: Array, p: float) -> Array:
    """Indices, ascending, of the fewest largest weights that are together at least p of the sum."""
    total = weights.sum(dtype=np.float64)
    # All weights below this one are together at most half of what may be left out: none of them is needed.
    candidates = np.sort(weights[weights >= (1 - p) * total / (2 * len(weights))])[::-1]
    last = _reaching(candidates, p * total / candidates.sum(dtype=np.float64), beyond=False)
    return _largest(weights, candidates[last], last + 1)


def _largest(values: Array, last: float, count: int) -> Array:
    """Indices, ascending, of the ``count`` largest values, the smallest of which is ``last``; of equal ones the first are kept."""
    kept = np.flatnonzero(values >= last)
    if surplus := len(kept) - count:
        kept = np.delete(kept, np.flatnonzero(values[kept] == last)[-surplus:])
    return kept


_BLOCK = 256


def _reaching(weights: Array, share: float, *, beyond: bool) -> int:
    """The index at which the sum of the weights so far comes to this share of the whole, or ``beyond`` it.

    Sums of blocks first, then one block: few numbers are summed exactly enough in float32, and running sums of a vocabulary are slow.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum(dtype=np.float64)
    goal = share * sums[-1]
    block = _first(sums, goal, beyond=beyond)
    within = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _first(within, goal - (sums[block - 1] if block else 0.0), beyond=beyond)


def _first(sums: Array, goal: float, *, beyond: bool) -> int:
    """The first index whose running sum is at least ``goal``, or above it; a goal that rounding put past the last sum belongs to what
    reached that."""
    return int(min(np.searchsorted(sums, goal, side="right" if beyond else "left"), np.searchsorted(sums, sums[-1])))
