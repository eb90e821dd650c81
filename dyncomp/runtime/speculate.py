"""Lossless speculation: guess the next tokens from the text so far, and check all of them in one pass.

The guesses are those that followed the last time the text went like this (prompt lookup; A. Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding). A guess counts only where the model's own choice, greedy or sampled, is that very
token, so the text is what it would be without; what changes is how many passes over the weights it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from dyncomp.runtime.session import Array, ExtendableSession

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens at the end of the text that must have occurred before."""
MOST = 7
"""Tokens guessed at a time."""
PAUSE = 24
"""Steps without guesses after guessing did not pay."""


@dataclass
class SpeculationReport:
    """What speculation did.

    Args:
        guessed, accepted: tokens.
        passes: runs of the model that decoded something; tokens: that they gave.
        pauses: how often guessing was turned off because it did not pay.
    """

    guessed: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0
    pauses: int = 0

    def __str__(self) -> str:
        rate = f"{self.tokens / self.passes:.2f} tokens a pass" if self.passes else "nothing decoded"
        off = f"; turned off {self.pauses} times, for it did not pay" if self.pauses else ""
        return f"speculation: {self.accepted} of {self.guessed} guessed tokens accepted, {rate}{off}"


@dataclass
class _Costs:
    """Running means: seconds of a pass by its tokens, and how often a guess is right."""

    seconds: dict[int, float] = field(default_factory=dict)
    right: float = 0.5

    def note(self, tokens: int, seconds: float) -> None:
        known = self.seconds.get(tokens)
        self.seconds[tokens] = seconds if known is None else 0.8 * known + 0.2 * seconds

    def judge(self, guessed: int, accepted: int) -> None:
        for index in range(min(accepted + 1, guessed)):
            self.right += 0.1 * ((index < accepted) - self.right)

    def best_length(self, available: int) -> int:
        """How many guesses give the most tokens a second; lengths that were never timed are tried."""
        one = self.seconds.get(1)
        best, rate = 0, 0.0 if one is None else 1 / one
        for length in range(1, available + 1):
            expected = sum(self.right**i for i in range(length + 1))
            seconds = self.seconds.get(length + 1)
            if seconds is None:
                seconds = min((s for n, s in self.seconds.items() if n > length + 1), default=one or 0.0)
            if seconds == 0 or expected / seconds > rate:
                best, rate = length, expected / seconds if seconds else float("inf")
        return best


class Speculation:
    """A :class:`~dyncomp.runtime.session.DecoderSession` around another one. Batches of several sequences pass through as they are.

    Args:
        clock: seconds; what a pass costs decides how many tokens are guessed.
    """

    def __init__(self, session: ExtendableSession, clock: Callable[[], float] = time.perf_counter) -> None:
        self.session, self._clock = session, clock
        self.engine, self.cached, self.threads, self.context_length = (
            session.engine,
            session.cached,
            session.threads,
            session.context_length,
        )
        self.report = SpeculationReport()
        self._costs = _Costs()
        self.reset()

    def reset(self) -> None:
        self._text: Lookup | None = None  # None: more than one sequence
        self._ahead: list[tuple[int, Array]] = []  # guessed tokens in the cache that are not confirmed, with the logits after each
        self._guessed = self._taken = self._pause = 0
        self.session.reset()

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        self.reset()
        if len(ids) == 1:
            self._text = Lookup(int(t) for t in ids[0, : lengths[0]])
            self._room = room
        return self.session.prefill(ids, lengths, room)

    def step(self, ids: Array) -> Array:
        if self._text is None:
            return self.session.step(ids)
        token = int(ids[0])
        self._text.append(token)
        self._room -= 1
        self.report.tokens += 1
        if self._ahead and self._ahead[0][0] == token:
            self._taken += 1
            return self._ahead.pop(0)[1][None]
        self._settle()
        guess = self._guess()
        start = self._clock()
        logits = self.session.extend(np.array([token, *guess])) if guess else self.session.step(ids)
        self._costs.note(1 + len(guess), self._clock() - start)
        self.report.passes += 1
        if guess:
            self._guessed, self._taken = len(guess), 0
            logits = np.array(logits)
            self._ahead = [(t, logits[i + 1]) for i, t in enumerate(guess)]
        return logits[:1]

    def _settle(self) -> None:
        """Forget the guesses that were wrong, and learn from it."""
        if self._ahead:
            self.session.rewind(len(self._ahead))
            self._ahead = []
        if self._guessed:
            self._costs.judge(self._guessed, self._taken)
            self.report.guessed += self._guessed
            self.report.accepted += self._taken
            self._guessed = 0

    def _guess(self) -> list[int]:
        if self._pause:
            self._pause -= 1
            return []
        found = self._text.following(min(MOST, self._room)) if self._text is not None else []
        if not found or 1 not in self._costs.seconds:
            return []
        length = self._costs.best_length(len(found))
        if length == 0:
            self.report.pauses += 1
            self._pause, self._costs.right = PAUSE, 0.5  # then it is given another chance
        return found[:length]


class Lookup:
    """A text, and where each of its short sequences of tokens occurred last."""

    def __init__(self, text: Iterable[int]) -> None:
        self.text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # sequence -> where its latest occurrence ended
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        for ending in self._endings():  # from here on something follows it
            self._after[ending] = len(self.text)
        self.text.append(token)

    def following(self, most: int) -> list[int]:
        """What followed the latest earlier occurrence of the longest known ending, at most ``most`` tokens."""
        for ending in self._endings():
            if (start := self._after.get(ending)) is not None:
                return self.text[start : start + most]
        return []

    def _endings(self) -> Iterator[tuple[int, ...]]:
        for size in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
            if len(self.text) >= size:
                yield tuple(self.text[-size:])
