"""Measure decoding and prefill of several sessions side by side, and where one spends its time."""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dyncomp.runtime.session import Array, DecoderSession, Seq2SeqSession

_BLOCK, _SETTLE = 16, 3  # steps a session runs before the next has its turn; the first of them are not counted


@dataclass(frozen=True)
class Variant:
    """A session to measure, and what the report says of it."""

    session: DecoderSession
    variant: str  # "dense" | "converted"
    precision: str = "fp32"


class Reading:
    """An encoder–decoder as a :class:`~dyncomp.runtime.session.DecoderSession`: its prompt is what the encoder reads, or noise of the one
    size that it hears.

    Args:
        takes: the encoder's first input, as ``config.json`` describes it.
    """

    def __init__(self, session: Seq2SeqSession, takes: Mapping[str, Any]) -> None:
        self.engine, self.cached, self.threads = session.engine, session.cached, session.threads
        self.context_length, self.step, self.reset = session.context_length, session.step, session.reset
        self._session = session
        self.hears = str(takes["dtype"]).startswith("float")
        self._name, self._shape = takes["name"], [size for size in takes["shape"] if not isinstance(size, str)]

    def prefill(self, ids: Array, lengths: Array, room: int) -> Array:
        if self.hears:
            heard = np.random.default_rng(0).standard_normal((len(ids), *self._shape), np.float32)
            self._session.encode(**{self._name: heard})
        else:
            self._session.encode(**{name: np.ones_like(ids) if name == "attention_mask" else ids for name in self._session.reads})
        return self._session.prefill(np.zeros((len(ids), 1), np.int64), np.ones(len(ids), np.int64), room)


def bench(
    variants: list[Variant], *, prompt_tokens: int = 512, context: int = 64, decode_tokens: int = 128, batch: int = 1, rounds: int = 3,
    vocabulary: int = 1000, text: Array | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Decode and prefill rates of each session.

    The sessions take turns in one process: prefills one each a round, decoding in blocks of a few steps whose first are
    not counted, so that whatever else the machine does touches all alike. Rates come from the median step, and the median prefill.

    Args:
        variants: what to measure.
        prompt_tokens: length of the prefill that is timed.
        context: tokens already in the cache when decoding begins.
        decode_tokens: steps counted for each session, at least.
        batch: sequences at a time; rates count the tokens of all.
        rounds: prefills counted for each session, after one that is not.
        text: tokens [any, any] to read and to decode, for what a token costs may depend on it; repeated where there are too few.
        vocabulary: without ``text``, random tokens below it.

    Returns:
        For each variant the keys of a ``bench`` entry in a report: ``engine``, ``variant``, ``precision``, ``threads``, ``batch``,
        ``decode_tokens_per_s``, ``prefill_tokens_per_s``, ``prefill_tokens``.
    """
    blocks, start = -(-decode_tokens // (_BLOCK - _SETTLE)), min(context, prompt_tokens)
    shape = batch, max(prompt_tokens, start + blocks * _BLOCK)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape) if text is None else np.resize(text, shape)
    prompt = np.ascontiguousarray(tokens[:, :prompt_tokens])
    prefills: list[list[float]] = [[] for _ in variants]
    for turn in range(rounds + 1):
        for index, v in enumerate(variants):
            rest()
            seconds = timed(lambda s=v.session: s.prefill(prompt, np.full(batch, prompt_tokens), 1))
            if turn:
                prefills[index].append(seconds)
    for v in variants:
        v.session.prefill(np.ascontiguousarray(tokens[:, :start]), np.full(batch, start), blocks * _BLOCK)
    steps: list[list[float]] = [[] for _ in variants]
    for block in range(blocks):
        first = start + block * _BLOCK
        read = [np.ascontiguousarray(tokens[:, at]) for at in range(first, first + _BLOCK)]
        for index, v in enumerate(variants):
            rest()
            times = [timed(lambda s=v.session, t=token: s.step(t)) for token in read]
            steps[index] += times[_SETTLE:]
    return [
        {
            "engine": v.session.engine, "variant": v.variant, "precision": v.precision, "threads": v.session.threads, "batch": batch,
            "decode_tokens_per_s": batch / statistics.median(steps[i]),
            "prefill_tokens_per_s": batch * prompt_tokens / statistics.median(prefills[i]), "prefill_tokens": prompt_tokens,
        }
        for i, v in enumerate(variants)
    ]  # fmt: skip


def rest() -> None:
    """Wait, at most a second, until no thread of this process computes: those of ONNX Runtime and TVM wait for work by spinning, tens of
    milliseconds after they had any, and on two cores the session that has its turn next would take up to twice as long."""
    for _ in range(50):
        start = time.process_time()
        time.sleep(0.02)
        if time.process_time() - start < 0.002:
            break


def timed(call: Any) -> float:
    """Seconds of a call without arguments."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def operator_times(profile: str | Path, *, groups: Mapping[str, str] | None = None) -> dict[str, float]:
    """Milliseconds a run spends in each operator type, from a profile that ONNX Runtime wrote.

    Each node counts with its median time, times the share of runs it took part in (a branch does not run always).

    Args:
        profile: the file; its runs must have like inputs (profile decode steps only).
        groups: pattern over node names -> group name; nodes that match are counted there, first match first.
    """
    times: dict[tuple[str, str], list[float]] = {}
    for node, op, milliseconds in _own_times(json.loads(Path(profile).read_text())):
        times.setdefault((node, op), []).append(milliseconds)
    runs = max(map(len, times.values()), default=1)
    result: dict[str, float] = {}
    for (node, op), durations in times.items():
        group = next((name for pattern, name in (groups or {}).items() if re.search(pattern, node)), op)
        result[group] = result.get(group, 0.0) + statistics.median(durations) * len(durations) / runs
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def _own_times(events: list[dict[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """(node, operator, ms) of each kernel call, without the calls inside it: an ``If`` contains those of its branch."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    open_calls: list[list[Any]] = []  # [end, event, time of the calls inside]
    for event in [*sorted(kernels, key=lambda e: (e["ts"], -e["dur"])), None]:
        while open_calls and (event is None or event["ts"] >= open_calls[-1][0]):
            _, done, inside = open_calls.pop()
            yield done["name"].removesuffix("_kernel_time"), done["args"]["op_name"], max(done["dur"] - inside, 0) / 1000
        if event is not None:
            if open_calls:
                open_calls[-1][2] += event["dur"]
            open_calls.append([event["ts"] + event["dur"], event, 0])
