"""Hold a graph with a KV cache against the graph without: in chunks, and with rows of different lengths."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.passes.split_encoder import encode
from torch import Tensor, fx

from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.regions.tokens import random_inputs, token_input

_LENGTH, _PREFILL, _SHORTER = 12, 7, 2  # tokens a row; tokens of the first chunk; how much shorter the second row is
_SIZES = {"batch": 2}
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


def verify_cache(before: Graph, after: Graph, attempts: int = 3) -> tuple[float | None, str | None]:
    """Compare on random tokens.

    Args:
        before: (input_ids) -> logits; or of an encoder–decoder, with its encoder's inputs.
        after: what ``add-kv-cache`` made of it.
        attempts: a router near its threshold may choose differently after rounding; a real difference shows each time.

    Returns:
        (relative error, None) when they agree; (relative error, where the first difference is) when they do not;
        (None, None) when the weights are on the meta device and nothing can be run.
    """
    if any(t.is_meta for t in before.constants().values()):
        return None, None
    error, where = float("inf"), "the output"
    for seed in range(attempts):
        whole = random_inputs(before, {d: _SIZES.get(d, _LENGTH) for s in before.inputs for d in s.shape if isinstance(d, str)}, seed)
        with torch.no_grad(), float_activations(*(g for g in (before, after, after.encoder) if g is not None)):
            expected = before(**whole)
            error, where = _compare(before, after, whole, expected)
        if error <= _TOLERANCE.get(expected.dtype, 5e-2):
            return error, None
    return error, where


def _compare(before: Graph, after: Graph, whole: dict[str, Tensor], expected: Tensor) -> tuple[float, str]:
    context = after.info["kv_cache"]["context_length"]
    total = min(_LENGTH, context)
    first = min(_PREFILL, total)
    tokens = whole[before.inputs[token_input(before) or 0].name]
    encoded = encode(after, whole)
    state = {s.name: torch.zeros([_SIZES[d] if d == "batch" else total if isinstance(d, str) else d for d in s.shape], dtype=s.dtype)
             for s in after.inputs if "_cache_" in s.name}  # fmt: skip
    lengths = torch.tensor([first, max(first - _SHORTER, 1)])  # real tokens of the first chunk, the rest is padding
    past = torch.zeros(2, dtype=torch.int64)
    chunk, worst, where = tokens[:, :first], 0.0, "the output"
    scale = expected.abs().max().clamp_min(1e-30)
    while True:
        chosen = {"chosen": lengths[:, None] - 1} if any(s.name == "chosen" for s in after.inputs) else {}
        inputs = {"input_ids": chunk, "past_length": past} | chosen | state | encoded
        logits, *caches = after(**inputs)
        state = dict(zip(state, caches, strict=True))
        for row in range(2):
            length, start = int(lengths[row]), int(past[row])
            wanted = expected[row, start : start + length]
            given = logits[row, :length] if logits.shape[1] == chunk.shape[1] else logits[row]
            error = float((given - wanted[-given.shape[0] :]).abs().max() / scale)
            if not error <= worst:
                worst = error if error == error else float("inf")
                if worst > 1e-5:
                    where = _first_difference(before, after, whole, inputs, row, start, length) or where
        past = past + lengths
        left = total - int(past.max())
        if left <= 0:
            return worst, where
        size = 1 if int(past.max()) == first else left
        chunk = torch.stack([tokens[row, int(past[row]) : int(past[row]) + size] for row in range(2)])
        lengths = torch.full((2,), size)


def _first_difference(
    before: Graph, after: Graph, given: dict[str, Tensor], inputs: dict[str, Tensor], row: int, start: int, length: int
) -> str | None:
    """The first node that both graphs have and whose values differ on the given tokens of a row."""
    whole, part = _values(before, given), _values(after, inputs)
    batch, sequence = before.inputs[token_input(before) or 0].shape
    for node in before.nodes:
        shape = before.shape(node)
        if node.name not in part or not shape or shape[0] != batch or list(shape).count(sequence) != 1:
            continue
        axis = list(shape).index(sequence) - 1
        a, b = whole[node.name][row], part[node.name][row]
        if not a.is_floating_point() or a.dim() != b.dim() or b.shape[axis] < length:
            continue
        a, b = a.narrow(axis, start, length), b.narrow(axis, 0, length)
        if a.shape == b.shape and float((a - b).abs().max()) > 1e-4 * float(a.abs().max()):
            return f"{node.name} in {node.meta['path']}" if node.meta.get("path") else node.name
    return None


def _values(graph: Graph, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                found[n.name] = result
            return result

    Recorder(graph.module).run(*(inputs[s.name] for s in graph.inputs))
    return found
