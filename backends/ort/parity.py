"""Hold a lowered model against the graph it was lowered from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dyncomp.backends.ort.decoder import decoder_for
from dyncomp.backends.ort.run import OrtModel
from dyncomp.backends.torch.decoder import decoder_for as torch_decoder_for
from dyncomp.graph import Graph


def parity(graph: Graph, model: OrtModel, *, prompt_tokens: int = 48, steps: int = 64, seed: int = 0) -> dict[str, Any]:
    """Run both on the same random inputs.

    A decoder is prefilled with two rows of different lengths and decoded for ``steps`` steps, both backends fed the tokens
    that the graph finds likeliest; other models run once, with a padded row.

    Returns:
        a ``parity`` entry of a report: ``relative_error`` is the largest absolute difference over the largest absolute value
        of the graph's outputs; ``greedy_tokens_equal`` the fraction of steps whose likeliest token agrees (None for others).
    """
    random = np.random.default_rng(seed)
    if graph.info.get("task") != "causal-lm":
        error, equal = _once(graph, model, random), None
    else:
        error, equal = _decode(graph, model, random, prompt_tokens, steps)
    return {"backend": "ort", "precision": "fp32", "relative_error": error, "greedy_tokens_equal": equal}


def _decode(graph: Graph, model: OrtModel, random: np.random.Generator, prompt_tokens: int, steps: int) -> tuple[float, float]:
    sessions = torch_decoder_for(graph), decoder_for(model)
    context = min((s.context_length for s in sessions if s.context_length), default=1 << 30)
    prompt_tokens = max(2, min(prompt_tokens, context // 2))
    steps = max(1, min(steps, context - prompt_tokens))
    vocabulary = _vocabulary(graph)
    ids = random.integers(0, vocabulary, (2, prompt_tokens))
    lengths = np.array([prompt_tokens, prompt_tokens // 2 + 1])
    expected, actual = (s.prefill(ids, lengths, steps) for s in sessions)
    worst, equal = _error(actual, expected), 0
    for _ in range(steps):
        tokens = expected.argmax(-1)
        equal += int((actual.argmax(-1) == tokens).sum())
        expected, actual = (s.step(tokens) for s in sessions)
        worst = max(worst, _error(actual, expected))
    return worst, equal / (steps * len(lengths))


def _once(graph: Graph, model: OrtModel, random: np.random.Generator) -> float:
    sizes = {"batch": 2, "sequence": 24}
    inputs = {}
    for spec in graph.inputs:
        shape = [sizes.get(d, 8) if isinstance(d, str) else d for d in spec.shape]
        if spec.dtype.is_floating_point:
            inputs[spec.name] = random.standard_normal(shape).astype(np.float32)
        elif spec.name.endswith("mask"):
            inputs[spec.name] = np.ones(shape, np.int64)
            inputs[spec.name][0, -shape[-1] // 3 :] = 0
        else:
            inputs[spec.name] = random.integers(0, _vocabulary(graph), shape)
    with torch.no_grad():
        expected = graph(**{name: torch.as_tensor(value) for name, value in inputs.items()})
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = model.run(**inputs)
    return max(_error(actual[name], value.numpy()) for name, value in zip(graph.outputs, expected, strict=True))


def _vocabulary(graph: Graph) -> int:
    """Rows of the smallest table that token ids index, or a small number."""
    rows = [graph.tensor(n.args[0]).shape[0] for n in graph.nodes if n.target is torch.ops.aten.embedding.default and _reads_input(n)]  # type: ignore[arg-type]
    return min(rows, default=16)


def _reads_input(node: torch.fx.Node) -> bool:
    index = node.args[1]
    return isinstance(index, torch.fx.Node) and index.op == "placeholder"


def _error(actual: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    if not np.isfinite(actual).all():
        return float("inf")
    return float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), 1e-30))
