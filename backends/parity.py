"""Hold a lowered model against the graph it was lowered from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from dyncomp.backends.recompute import Array
from dyncomp.backends.torch.decoder import decoder_for as torch_decoder_for

from dyncomp.graph import Graph
from dyncomp.interpret import sparse_nodes
from dyncomp.regions import find_routed
from dyncomp.regions.depth import find_skips
from dyncomp.regions.tokens import random_inputs, vocabulary_size
from dyncomp.runtime.session import DecoderSession


def parity(
    graph: Graph, model: Any, session: Callable[[Any], DecoderSession], *, backend: str, prompt_tokens: int = 48, steps: int = 64,
    attempts: int = 3, seed: int = 0, good: float = 1e-4,
) -> dict[str, Any]:  # fmt: skip
    """Run both on the same random inputs.

    A decoder is prefilled with two rows of different lengths and decoded for ``steps`` steps, both backends fed the tokens
    that the graph finds likeliest; other models run once, with a padded row.

    Args:
        model: the artifact, opened by its backend; ``session`` makes what decodes with it.
        good: a relative error that ends the attempts.
        attempts: how many inputs to try at most. A router whose score is within rounding of its threshold may choose either way
            in either program, and from there on they legitimately differ; a wrong program differs on every input.

    Returns:
        a ``parity`` entry of a report: ``relative_error`` is the largest absolute difference over the largest absolute value
        of the graph's outputs; with weights in few bits and routers, or inputs that count as zero, ``typical_error`` is the largest of
        :data:`TYPICAL` of the tokens;
        ``greedy_tokens_equal`` the fraction of steps whose likeliest token agrees (None for others); ``attempts`` the number of
        inputs it took.
    """
    gated = graph.precision != "fp32" and bool(find_routed(graph) or find_skips(graph) or sparse_nodes(graph))
    best: dict[str, Any] = {}
    for attempt in range(attempts):
        random = np.random.default_rng(seed + attempt)
        if graph.info.get("task") == "causal-lm" or "kv_cache" in graph.info:
            errors, equal = _decode(graph, session(model), random, prompt_tokens, steps)
        else:
            errors, equal = _once(graph, model, seed + attempt), None
        found = {"relative_error": float(errors.max())}
        if gated and np.isfinite(errors).all():
            found["typical_error"] = float(np.sort(errors)[int(TYPICAL * (len(errors) - 1))])
        if not best or found["relative_error"] < best["relative_error"]:
            best = found | {"greedy_tokens_equal": equal}
        if best["relative_error"] <= good:
            break
    return {"backend": backend, "precision": model.precision, **best, "attempts": attempt + 1}


TYPICAL = 0.9
"""Of the tokens: a gate within rounding of its threshold opens in one program and not in the other, and where that is a whole layer, or
many inputs of linear layers, its token differs by more than rounding. With weights in few bits that is a token in fifty; a wrong program
is wrong about most."""


def error_of(entry: dict[str, Any]) -> float:
    """What a ``parity`` entry is judged by: ``typical_error`` where it has one, else ``relative_error``."""
    return entry.get("typical_error", entry["relative_error"])


def _decode(
    graph: Graph, lowered: DecoderSession, random: np.random.Generator, prompt_tokens: int, steps: int
) -> tuple[Array, float | None]:
    """(relative error of each step's tokens, the fraction of the steps whose likeliest token agrees)"""
    sessions: tuple[DecoderSession, DecoderSession] = torch_decoder_for(graph), lowered
    context = min((s.context_length for s in sessions if s.context_length), default=1 << 30)
    prompt_tokens = max(2, min(prompt_tokens, context // 2))
    steps = max(1, min(steps, context - prompt_tokens))
    if graph.encoder is not None:
        sizes = {d: prompt_tokens for s in graph.encoder.inputs for d in s.shape if isinstance(d, str)} | {"batch": 2}
        read = {name: value.numpy() for name, value in random_inputs(graph.encoder, sizes, int(random.integers(1 << 30))).items()}
        for session in sessions:
            session.encode(**read)  # type: ignore[attr-defined]
    ids = random.integers(0, vocabulary_size(graph), (2, prompt_tokens))
    lengths = np.array([prompt_tokens, prompt_tokens // 2 + 1])
    own, other = sessions  # one after the other: threads of one that wait for work would take time from the other's
    expected = [own.prefill(ids, lengths, steps)]
    for _ in range(steps):
        expected.append(own.step(expected[-1].argmax(-1)))
    errors, equal = [], 0
    actual = other.prefill(ids, lengths, steps)
    for now in expected[:-1]:
        tokens = now.argmax(-1)
        errors.append(_errors(actual, now))
        equal += int((actual.argmax(-1) == tokens).sum())
        actual = other.step(tokens)
    return np.concatenate([*errors, _errors(actual, expected[-1])]), equal / (steps * len(lengths))


def _once(graph: Graph, model: Any, seed: int) -> Array:
    """Relative error of each token, or of what else the outputs have a vector for."""
    sizes = {d: 8 for s in graph.inputs for d in s.shape if isinstance(d, str)} | {"batch": 2, "sequence": 24}
    inputs = random_inputs(graph, sizes, seed)
    with torch.no_grad():
        expected = graph(**inputs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = model.run(**inputs)
    return np.concatenate([_errors(actual[name], value.numpy()) for name, value in zip(graph.outputs, expected, strict=True)])


def _errors(actual: Array, expected: Array) -> Array:
    """[vectors of the last dimension]: largest difference of each, over the largest value of all."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return np.array([np.inf])
    return np.abs(actual - expected).max(-1).flatten() / max(float(np.abs(expected).max()), 1e-30)
