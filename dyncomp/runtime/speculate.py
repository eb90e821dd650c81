"""Lossless speculation: guess the next tokens, and check all of them in one pass.

The guesses are those that followed the last time the text went like this (prompt lookup; A. Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding), or what a cheaper model finds likeliest (2211.17192). A guess counts only where the
model's own choice, greedy or sampled, is that very token. For sampled text this is the rejection rule of that paper for a proposal that
is certain of its token x: x is kept with the probability p(x) that the model gives it, else the token comes from p without x. So the text
is what it would be without, for the same seed the very same; what changes is how many passes over the weights it takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dyncomp.runtime.session import Array, ExtendableSession

LONGEST_MATCH, SHORTEST_MATCH = 4, 2
"""Tokens at the end of the text that must have occurred before."""
MOST = 7
"""Tokens guessed at a time."""
PAUSE, LONGEST_PAUSE = 24, 384
"""Steps without guesses after guessing did not pay; twice as many each time that it does not, within a text."""


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
    """Running means: how often a guess is right, seconds of a pass by its tokens, seconds to guess a token."""

    right: float
    seconds: dict[int, float] = field(default_factory=dict)
    guess: float = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        known = self.seconds.get(tokens)
        self.seconds[tokens] = seconds if known is None else 0.8 * known + 0.2 * seconds

    def note_guess(self, seconds: float) -> None:
        self.guess = 0.8 * self.guess + 0.2 * seconds if self.guess else seconds

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
            seconds += length * self.guess
            if seconds == 0 or expected / seconds > rate:
                best, rate = length, expected / seconds if seconds else float("inf")
        return best


class Drafter(Protocol):
    """What guesses how a text goes on."""

    hope: float
    """How often its guesses are taken to be right before that is known: one that is hoped less of than it needs to pay is never tried."""

    def begin(self, text: list[int], room: int) -> None:
        """A new text, that at most ``room`` tokens will follow."""

    def append(self, token: int) -> None:
        """The text goes on with this token."""

    def available(self, most: int) -> int:
        """How many tokens, at most ``most``, can be guessed now."""

    def prepare(self) -> None:
        """What has to be done once a text before it can guess, and does not count as guessing."""

    def following(self, most: int) -> list[int]:
        """The next tokens, at most ``most``, as it guesses them."""


class Speculation:
    """A :class:`~dyncomp.runtime.session.DecoderSession` around another one. Batches of several sequences pass through as they are.

    Args:
        clock: seconds; what a pass and a guess cost decides how many tokens are guessed.
        drafter: what guesses; by default the text so far (:class:`Lookup`).
    """

    def __init__(
        self, session: ExtendableSession, clock: Callable[[], float] = time.perf_counter, *, drafter: Drafter | None = None
    ) -> None:
        self.session, self._drafter, self._clock = session, drafter or Lookup(), clock
        self.engine, self.cached, self.threads, self.context_length = (
            session.engine,
            session.cached,
            session.threads,
            session.context_length,
        )
        self.report = SpeculationReport()
        self._costs = _Costs(self._drafter.hope)
        self.reset()

    def reset(self) -> None:
        self._alone = False  # one sequence
        self._ahead: list[tuple[int, Array]] = []  # guessed tokens in the cache that are not confirmed, with the logits after each
        self._guessed = self._taken = self._pause = 0
        self._next_pause = PAUSE
        self.session.reset()

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        self.reset()
        if len(ids) == 1:
            self._drafter.begin([int(t) for t in ids[0, : lengths[0]]], room)
            self._alone, self._room = True, room
        return self.session.prefill(ids, lengths, room)

    def step(self, ids: Array) -> Array:
        if not self._alone:
            return self.session.step(ids)
        token = int(ids[0])
        self._drafter.append(token)
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
        available = self._drafter.available(min(MOST, self._room))
        if not available or 1 not in self._costs.seconds:
            return []
        length = self._costs.best_length(available)
        if length == 0:
            self.report.pauses += 1
            self._pause, self._costs.right = self._next_pause, self._drafter.hope  # then it is given another chance
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
            return []
        self._drafter.prepare()
        start = self._clock()
        found = self._drafter.following(length)
        self._costs.note_guess((self._clock() - start) / length)
        return found


class Lookup:
    """A text, and where each of its short sequences of tokens occurred last."""

    hope = 0.5

    def __init__(self, text: Iterable[int] = ()) -> None:
        self.begin(text)

    def begin(self, text: Iterable[int], room: int = 0) -> None:
        self.text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # sequence -> where its latest occurrence ended
        for token in text:
            self.append(token)

    def append(self, token: int) -> None:
        for ending in self._endings():  # from here on something follows it
            self._after[ending] = len(self.text)
        self.text.append(token)

    def available(self, most: int) -> int:
        return len(self.following(most))

    def prepare(self) -> None:
        pass

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


class Draft:
    """A cheaper model, and the tokens that it finds likeliest. It reads a text only once it is asked for guesses."""

    hope = 0.9

    def __init__(self, session: ExtendableSession) -> None:
        self.session = session

    def begin(self, text: list[int], room: int) -> None:
        self._text = list(text)
        self._limit = min(len(text) + room, self.session.context_length or len(text) + room)
        self._seen: list[int] = []  # tokens in its cache
        self._same = 0  # of them, those known to be the text's

    def prepare(self) -> None:
        if not self._seen:
            self.session.prefill(np.array([self._text[:-1]]), np.array([len(self._text) - 1]), self._limit - len(self._text) + 1)
            self._seen = self._text[:-1]
            self._same = len(self._seen)

    def append(self, token: int) -> None:
        self._text.append(token)

    def available(self, most: int) -> int:
        return max(0, min(most, self._limit - len(self._text)))

    def following(self, most: int) -> list[int]:
        while self._same < min(len(self._seen), len(self._text)) and self._seen[self._same] == self._text[self._same]:
            self._same += 1
        if self._same < len(self._seen):
            self.session.rewind(len(self._seen) - self._same)
        logits = self.session.extend(np.array(self._text[self._same :]))[-1]
        self._seen, self._same, found = list(self._text), len(self._text), [int(logits.argmax())]
        while len(found) < most:
            logits = self.session.step(np.array(found[-1:]))[0]
            self._seen.append(found[-1])
            found.append(int(logits.argmax()))
        return found
