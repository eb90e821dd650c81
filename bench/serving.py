"""What serving a dense model takes, beside the bare runtime: eight requests at a time, Python's share of a step, loading, speculation.

    python -m bench.serving [--threads 2] [--model smollm2-135m] [--precision fp32 int8 int4] [--cpu-time] [--json FILE]

All in one process and taking turns, but for loading, which has a process of its own (:mod:`bench.loading`). Medians; greedy unless said.
On a machine that others use, ``--cpu-time`` with one thread counts the processor's seconds, where the clock says how long the others ran.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dyncomp.backends.ort.decoder import Binding, OrtDecoder
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.ort.slots import OrtSlots
from dyncomp.passes import Quantize

from bench.loading import measured
from dyncomp.deploy import dense_artifact
from dyncomp.examples import packaged_text
from dyncomp.hardware import default_threads
from dyncomp.models import load_model
from dyncomp.report.markdown import SERVING, serving_cells
from dyncomp.report.tables import show, table
from dyncomp.runtime.batching import Batcher
from dyncomp.runtime.generate import Generator
from dyncomp.runtime.sampling import Sampling
from dyncomp.runtime.speculate import Draft, Speculation
from dyncomp.search import SCREEN
from dyncomp.trace import trace_model

Clock = Callable[[], float]
REQUESTS, PROMPT, STEPS, ROUNDS = 8, 64, 24, 6
WAYS = {
    "greedy": Sampling(max_tokens=STEPS), "temperature 0.8": Sampling(max_tokens=STEPS, temperature=0.8),
    "top-p 0.9": Sampling(max_tokens=STEPS, temperature=0.8, top_p=0.9),
}  # fmt: skip


def together(model: OrtModel, tokenizer: Any, texts: list[str], clock: Clock = time.perf_counter) -> dict[str, float]:
    """Tokens a second of one request and of as many as there are texts, each through a :class:`Batcher`: of decoding, and of whole
    requests of :data:`STEPS` tokens with their prompts."""
    capacity = max(len(tokenizer(text)["input_ids"]) for text in texts) + STEPS
    batchers = {n: Batcher(OrtSlots(model, slots=n, capacity=capacity), tokenizer) for n in (1, len(texts))}
    a_token: dict[int, list[float]] = {n: [] for n in batchers}  # seconds
    whole: dict[int, list[float]] = {n: [] for n in batchers}
    for turn in range(ROUNDS + 1):
        for n, batcher in batchers.items():
            begun, requests = clock(), [batcher.submit(text, WAYS["greedy"]) for text in (texts * 2)[turn % n :][:n]]
            batcher.step()  # all join, and decode once
            steps = []
            while not batcher.idle:
                before, start = sum(len(r.tokens) for r in requests), clock()
                batcher.step()
                if more := sum(len(r.tokens) for r in requests) - before:
                    steps.append((clock() - start) / more)
            if turn:
                a_token[n] += steps
                whole[n].append((clock() - begun) / sum(len(r.tokens) for r in requests))
    rates = {n: (1 / statistics.median(a_token[n]), 1 / statistics.median(whole[n])) for n in batchers}
    (one, one_whole), (all_, all_whole) = rates[1], rates[len(texts)]
    return {
        "requests": len(texts), "one_tokens_per_s": one, "tokens_per_s": all_, "ratio": all_ / one, "whole_ratio": all_whole / one_whole
    }  # fmt: skip


class _Watched:
    """A runtime session that notes when its runs begin and end."""

    def __init__(self, session: Any, runs: list[tuple[float, float]], clock: Clock) -> None:
        self._session, self._runs, self._clock = session, runs, clock

    def run_with_iobinding(self, *arguments: Any) -> None:
        start = self._clock()
        self._session.run_with_iobinding(*arguments)
        self._runs.append((start, self._clock()))


class _WatchedDecoder(OrtDecoder):
    def __init__(self, model: OrtModel, clock: Clock) -> None:
        self.runs: list[tuple[float, float]] = []
        self._clock = clock
        super().__init__(model)

    def _bind(self, *arguments: Any) -> Binding:
        binding = super()._bind(*arguments)
        binding._session = _Watched(binding._session, self.runs, self._clock)
        return binding


def overhead(model: OrtModel, tokenizer: Any, texts: list[str], clock: Clock = time.perf_counter) -> dict[str, Any]:
    """Of a step of :meth:`Generator.stream`: seconds within ``run_with_iobinding``, and what is spent outside of it (choosing the token,
    its text, the next call) as a share of that."""
    decoder = _WatchedDecoder(model, clock)
    generator, outside, inside = Generator(decoder, tokenizer), {way: [] for way in WAYS}, []  # type: ignore[var-annotated]
    for turn in range(ROUNDS + 1):
        for way, sampling in WAYS.items():
            decoder.runs.clear()
            for _ in generator.stream(texts[turn % len(texts)], sampling):
                pass
            steps = decoder.runs[1:]  # the first is the prompt's
            if turn:
                inside += [end - start for start, end in steps]
                outside[way] += [after[0] - before[1] for before, after in itertools.pairwise(steps)]
    step = statistics.median(inside)
    return {"step_seconds": step, "overhead": {way: statistics.median(seconds) / step for way, seconds in outside.items()}}


def speculation(
    model: OrtModel, tokenizer: Any, prompts: dict[str, str], clock: Clock = time.perf_counter, *, draft: OrtModel | None = None,
    tokens: int = 4 * STEPS,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Speculation, by prompt lookup or with what a cheaper model drafts, beside decoding without it, prompts included: tokens a second ×
    those without, and what was guessed and accepted."""
    found = {}
    for kind, prompt in prompts.items():
        drafter = None if draft is None else Draft(OrtDecoder(draft))
        plain, session = Generator(OrtDecoder(model), tokenizer), Speculation(OrtDecoder(model), clock, drafter=drafter)
        ways, seconds = (plain, Generator(session, tokenizer)), ([], [])  # type: ignore[var-annotated]
        for turn in range(ROUNDS + 1):
            done, spent = [], []
            for way in ways:
                start = clock()
                done.append(way.generate([prompt], Sampling(max_tokens=tokens))[0])
                spent.append(clock() - start)
            if done[0].tokens != done[1].tokens:
                raise AssertionError(f"speculation changed the text after the {kind} prompt")
            for times, each in zip(seconds, spent, strict=True):
                times += [each] if turn else []
        report = session.report
        found[kind] = {
            "speed": statistics.median(seconds[0]) / statistics.median(seconds[1]), "guessed": report.guessed, "accepted": report.accepted,
            "tokens_a_pass": report.tokens / max(1, report.passes), "pauses": report.pauses,
        }  # fmt: skip
    return found


def prompts_of(tokenizer: Any, windows: Any) -> tuple[list[str], dict[str, str]]:
    """Of text [windows, tokens]: prompts for requests, and a plain and a repetitive one for guessing."""
    rows = [row[at : at + PROMPT] for row in windows for at in range(0, len(row) - PROMPT + 1, PROMPT)][:REQUESTS]
    texts = [tokenizer.decode(row) for row in rows]
    return texts, {"repetitive": texts[0] * 2 + tokenizer.decode(rows[0][: PROMPT // 4]), "plain": texts[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's seconds; takes --threads 1")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.cpu_time and given.threads != 1:
        parser.error("--cpu-time takes --threads 1: threads that wait use the processor too")
    clock = time.process_time if given.cpu_time else time.perf_counter
    loaded = load_model(given.model)
    dense = trace_model(loaded)
    windows = packaged_text(loaded, dense)
    if windows is None:
        parser.error(f"{given.model} does not write text")
    texts, prompts = prompts_of(loaded.tokenizer, windows.tolist())
    rows = []
    cheap = Quantize(bits=4, symmetric=False, screen=SCREEN)
    draft = OrtModel(dense_artifact(dense, loaded.fingerprint, quantize=cheap), threads=given.threads)
    for precision in given.precision:
        quantize = None if precision == "fp32" else Quantize(bits=int(precision.removeprefix("int")))
        folder = dense_artifact(dense, loaded.fingerprint, quantize=quantize)
        model = OrtModel(folder, threads=given.threads)
        rows.append(
            {"model": loaded.name, "precision": precision, "threads": given.threads}
            | together(model, loaded.tokenizer, texts, clock)
            | overhead(model, loaded.tokenizer, texts, clock)
            | {"loading": measured(folder), "lookup": speculation(model, loaded.tokenizer, prompts, clock)}
            | {"drafted": speculation(model, loaded.tokenizer, prompts, clock, draft=draft)}
        )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    result = table(f"{loaded.name} dense, {given.threads} threads", *SERVING)
    for row in rows:
        result.add_row(*serving_cells(row))
    show(result)


if __name__ == "__main__":
    main()
