"""Speculation: the same text, whatever is guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from dyncomp.backends.recompute import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from test_batching import Modulo, lowered  # noqa: F401  (a fixture)
from test_runtime import END, Bytes

from dyncomp.deploy import Backend
from dyncomp.errors import RequestError
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampler, Sampling
from dyncomp.runtime.speculate import MOST, Draft, Lookup, Speculation


class Chant:
    """Continues by what followed the last two tokens in a song, with noise that depends on the whole text; counts its passes, and the
    seconds that they are said to take."""

    engine, cached, threads, context_length = "test", True, 1, 0

    def __init__(self, song: str, noise: float, slow: float = 0.0) -> None:
        self.song, self.noise, self.slow = [*song.encode()], noise, slow
        self.text: list[int] = []
        self.passes, self.now = 0, 0.0

    def reset(self) -> None:
        self.text = []

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        self.text = [int(t) for t in ids[0]]
        self.limit = len(self.text) + room
        return self._logits()[None]

    def step(self, ids: Array) -> Array:
        return self.extend(ids)

    def extend(self, ids: Array) -> Array:
        self.passes += 1
        self.now += 1.0 + self.slow * (len(ids) - 1)
        rows = []
        for token in ids:
            self.text.append(int(token))
            rows.append(self._logits())
        assert len(self.text) <= self.limit
        return np.stack(rows)

    def rewind(self, tokens: int) -> None:
        assert 0 < tokens < len(self.text)
        del self.text[-tokens:]

    def _logits(self) -> Array:
        seed = sum(t * (i + 1) for i, t in enumerate(self.text)) % 9973
        logits = self.noise * np.random.default_rng(seed).normal(size=END + 1)
        at = next((i for i in range(len(self.song) - 2) if self.song[i : i + 2] == self.text[-2:]), None)
        logits[self.song[at + 2] if at is not None else self.song[0]] += 4.0
        return logits.astype(np.float32)


songs = st.text("abc ", min_size=4, max_size=12)


@settings(max_examples=60, deadline=None)
@given(song=songs, noise=st.sampled_from([0.0, 1.0, 3.0]), temperature=st.sampled_from([0.0, 1.0]), seed=st.integers(0, 5))
def test_the_text_is_the_same(song: str, noise: float, temperature: float, seed: int) -> None:
    sampling = Sampling(max_tokens=60, temperature=temperature, seed=seed)
    (plain,) = Generator(Chant(song, noise), Bytes()).generate([song], sampling)
    session = Speculation(Chant(song, noise))
    (guessed,) = Generator(session, Bytes()).generate([song], sampling)
    assert guessed.tokens == plain.tokens
    assert guessed.finish == plain.finish


def test_a_text_that_repeats_itself_takes_few_passes() -> None:
    inner = Chant("la la li lo ", 0.0)
    session = Speculation(inner, lambda: inner.now)
    Generator(session, Bytes()).generate(["la la li lo la "], Sampling(max_tokens=200))
    assert inner.passes < 80
    assert session.report.passes == inner.passes
    assert session.report.accepted >= 100
    assert "tokens a pass" in str(session.report)


def test_guessing_that_does_not_pay_is_turned_off() -> None:
    inner = Chant("la la li lo ", 0.0, slow=2.0)
    session = Speculation(inner, lambda: inner.now)
    Generator(session, Bytes()).generate(["la la li lo la "], Sampling(max_tokens=120))
    assert session.report.pauses > 0
    assert session.report.guessed < 60
    assert session.report.pauses <= 3, "each pause is twice as long as the one before"
    assert "did not pay" in str(session.report)


class Markov(Chant):
    """Logits depend on the last token alone; a pass takes the seconds it is said to, of a clock that models share."""

    def __init__(self, table: Array, clock: list[float], seconds: float) -> None:
        super().__init__("x", 0.0)
        self.table, self.clock, self.seconds = table, clock, seconds

    def extend(self, ids: Array) -> Array:
        self.clock[0] += self.seconds
        return super().extend(ids)

    def _logits(self) -> Array:
        return self.table[self.text[-1]]


@settings(max_examples=60, deadline=None)
@given(noise=st.sampled_from([0.0, 1.0, 3.0]), temperature=st.sampled_from([0.0, 1.0]), context=st.sampled_from([0, 3, 20]))
def test_the_text_is_the_same_whatever_a_draft_guesses(noise: float, temperature: float, context: int) -> None:
    sampling = Sampling(max_tokens=60, temperature=temperature)
    (plain,) = Generator(Chant("abca b", 1.0), Bytes()).generate(["abca"], sampling)
    (draft := Chant("abca b", noise)).context_length = context
    session = Speculation(Chant("abca b", 1.0), drafter=Draft(draft))
    for _ in range(2):
        assert Generator(session, Bytes()).generate(["abca"], sampling)[0].tokens == plain.tokens
    assert (session.report.guessed > 0) == (context != 3)


def markov(draft_noise: float, draft_seconds: float) -> tuple[Array, Speculation]:
    random, clock = np.random.default_rng(0), [0.0]
    table = random.normal(size=(5, 5)).astype(np.float32)
    draft = Markov(table + draft_noise * random.normal(size=(5, 5)), clock, draft_seconds)
    return table, Speculation(Markov(table, clock, 1.0), lambda: clock[0], drafter=Draft(draft))


def sampled(session: Speculation, tokens: int) -> list[int]:
    sampler, text = Sampler(Sampling(temperature=1.0)), [0]
    logits = session.prefill(np.array([text]), np.array([1]), tokens)
    while len(text) <= tokens:
        text.append(sampler.choose(logits[0]))
        logits = session.step(np.array(text[-1:])) if len(text) <= tokens else logits
    return text


def test_tokens_sampled_by_rejection_have_the_models_distribution() -> None:
    table, session = markov(draft_noise=1.0, draft_seconds=0.01)
    text = sampled(session, 4000)
    assert 500 < session.report.accepted < session.report.guessed
    counts = np.zeros((5, 5))
    np.add.at(counts, (text[:-1], text[1:]), 1)
    weights = np.exp(table.astype(np.float64))
    expected = weights / weights.sum(1, keepdims=True) * counts.sum(1, keepdims=True)
    assert chisquare(counts, expected, axis=1).pvalue.min() > 0.01


def test_a_draft_that_costs_as_much_as_the_model_is_turned_off() -> None:
    passes = []
    for seconds in (0.01, 1.0):
        _, session = markov(draft_noise=0.0, draft_seconds=seconds)
        sampled(session, 300)
        passes.append(session.report.passes)
        assert (session.report.pauses > 0) == (seconds == 1.0)
    assert passes[0] < 200 < passes[1]


def test_lookup_takes_the_latest_of_the_longest() -> None:
    assert Lookup([1, 2, 3, 4, 9, 1, 2, 3, 5, 0, 1, 2, 3]).following(2) == [5, 0]
    assert Lookup([7, 1, 2, 8, 6, 1, 2, 9, 7, 1, 2]).following(3) == [8, 6, 1]
    assert Lookup([1, 2, 3]).following(MOST) == []
    assert Lookup([5, 5, 5]).following(MOST) == [5]
    assert Lookup([]).following(MOST) == []


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_lowered_model_says_the_same(lowered: tuple[Backend, Any], temperature: float) -> None:  # noqa: F811
    used, model = lowered
    sampling = Sampling(max_tokens=48, temperature=temperature)
    prompt = "again and again and again and"
    (plain,) = Generator(used.session(model), Modulo()).generate([prompt], sampling)
    session = Speculation(used.session(model))
    for _ in range(2):  # the second time with what was learned
        assert Generator(session, Modulo()).generate([prompt], sampling)[0].tokens == plain.tokens
    assert session.report.guessed > 0 or temperature  # a sampled text need not repeat itself
    drafted = Speculation(used.session(model), drafter=Draft(used.session(model)))
    assert Generator(drafted, Modulo()).generate([prompt], sampling)[0].tokens == plain.tokens
    two = Generator(session, Modulo()).generate([prompt, "other"], sampling)
    assert two[0].tokens == plain.tokens


def test_batches_do_not_grow_by_several_tokens(lowered: tuple[Backend, Any]) -> None:  # noqa: F811
    used, model = lowered
    session = used.session(model)
    session.prefill(np.ones((2, 3), np.int64), np.array([3, 3]), 8)
    with pytest.raises(RequestError, match="a batch of 2 sequences"):
        session.extend(np.array([1, 2]))
