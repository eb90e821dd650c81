"""What a branch of an ONNX graph costs by itself, and whether weights in it are packed when the session is made.

Graphs of one operator repeated, with and without an ``If`` around each: the difference, divided by their number. Weights are constants of
the outer graph, as ``backends/ort/gated.py`` leaves them. A product of few rows with a weight that is not packed packs it at every call,
so that turning prepacking off (``session.disable_prepacking``) slows down exactly what was packed before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

REPEATS, WIDTH, ROWS, HIDDEN = 64, 576, 16, 1536
ROUNDS = 15


def take_turns(runs: Mapping[str, Callable[[], object]], *, rounds: int = ROUNDS, calls: int = 20) -> dict[str, list[float]]:
    """Wall-clock microseconds of a call, a median for each round; in each round all take their turn, after one that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            times = []
            for _ in range(calls):
                start = time.perf_counter_ns()
                run()
                times.append((time.perf_counter_ns() - start) / 1e3)
            if turn:
                spent[name].append(statistics.median(times))
    return spent


def branch_times(threads: int = 1) -> dict[str, float]:
    """Microseconds: what an ``If`` adds that is taken, and one that is not."""
    x = np.ones((1, 1, WIDTH), np.float32)
    plain, branched = (_session(_repeated(inside), threads) for inside in (False, True))
    empty = _session(_repeated(False, count=1), threads)

    def call(session: Any, taken: bool) -> Callable[[], object]:
        return lambda: session.run(None, {"x": x, "taken": np.array(taken)})

    spent = take_turns(
        {"plain": call(plain, True), "taken": call(branched, True), "not taken": call(branched, False), "empty": call(empty, True)}
    )
    middle = {name: statistics.median(times) for name, times in spent.items()}
    one = (middle["plain"] - middle["empty"]) / (REPEATS - 1)  # microseconds of the operator alone
    return {
        "operator_us": one,
        "taken_us": (middle["taken"] - middle["plain"]) / REPEATS,
        "not_taken_us": (middle["not taken"] - middle["empty"] + one) / REPEATS,
    }


def packing_times(threads: int = 1) -> dict[str, float]:
    """Microseconds of a product [16, 576] @ [576, 1536] outside and inside a branch, packed and not."""
    x = np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)
    sessions = {
        (place, packed): _session(_product(place == "inside"), threads, prepack=packed == "packed")
        for place in ("outside", "inside") for packed in ("packed", "not packed")
    }  # fmt: skip
    runs = {f"{place}, {packed}": (lambda s=s: s.run(None, {"x": x, "taken": np.array(True)})) for (place, packed), s in sessions.items()}
    return {name: statistics.median(times) for name, times in take_turns(runs).items()}


def _session(model: Any, threads: int, *, prepack: bool = True) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _repeated(inside: bool, count: int = REPEATS) -> Any:
    """x -> tanh(tanh(…)), each of them in a branch or not."""
    nodes, last = [], "x"
    for index in range(count):
        result = "y" if index == count - 1 else f"h{index}"
        if inside:
            computed = _branch("Tanh", [last], f"computed_{index}")
            skipped = _branch("Identity", [last], f"skipped_{index}")
            nodes.append(helper.make_node("If", ["taken"], [result], then_branch=computed, else_branch=skipped))
        else:
            nodes.append(helper.make_node("Tanh", [last], [result]))
        last = result
    return _model(nodes, ["batch", "sequence", WIDTH], ["batch", "sequence", WIDTH], [])


def _product(inside: bool) -> Any:
    weight = np.random.default_rng(1).standard_normal((WIDTH, HIDDEN), np.float32)
    constants = [onnx.numpy_helper.from_array(weight, "w")]
    if inside:
        computed, skipped = _branch("MatMul", ["x", "w"], "computed"), _branch("Identity", ["x"], "skipped")
        nodes = [helper.make_node("If", ["taken"], ["y"], then_branch=computed, else_branch=skipped)]
    else:
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return _model(nodes, ["rows", WIDTH], ["rows", "features"], constants)


def _branch(operator: str, inputs: list[str], name: str) -> Any:
    result = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node(operator, inputs, [f"{name}_y"])], name, [], [result])


def _model(nodes: list[Any], taken: list[Any], given: list[Any], constants: list[Any]) -> Any:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, taken), helper.make_tensor_value_info("taken", TensorProto.BOOL, [])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, given)]
    graph = helper.make_graph(nodes, "branches", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
