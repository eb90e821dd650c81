"""One conditional branch for each expert: for activations the MoE operator does not have, and gates that may be negative."""

from __future__ import annotations

from typing import Any

import numpy as np

MICROSOFT = "com.microsoft"


def expand_experts(model: Any) -> None:
    """Replace every ``dyncomp.RoutedFFN`` node of an ``onnx_ir.Model``.

    before:  y = RoutedFFN(x [T, d], gates [T, E], up_0, down_0, up_1, …)
    after:   y_0 = 0;  y_{e+1} = If(any(gates[:, e]), ScatterND(y_e, rows, FFN_e(x[rows]) * gates[rows, e], add), y_e)

    An expert no token uses costs one test; one that some tokens use computes those only.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        if (node.domain, node.op_type) != ("dyncomp", "RoutedFFN"):
            continue
        tape = ir.tape.Tape()
        result = _Expansion(ir, tape, node).build()
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], list(tape.nodes), [node.outputs[0]], [result])
    model.graph.opset_imports.pop("dyncomp", None)


class _Expansion:
    def __init__(self, ir: Any, tape: Any, node: Any) -> None:
        self.ir, self.tape = ir, tape
        self.activation = node.attributes["activation"].as_string()
        self.gated, self.biased = (bool(node.attributes[a].as_int()) for a in ("gated", "biased"))
        self.x, self.gates, *self.weights = node.inputs
        self.prefix = node.outputs[0].name

    def build(self) -> Any:
        per_expert = 3 if self.biased else 2
        groups = [self.weights[i : i + per_expert] for i in range(0, len(self.weights), per_expert)]
        used = self.tape.op("Greater", [self.tape.op("ReduceMax", [self.tape.op("Abs", [self.gates]), self._ints([0])], {"keepdims": 0}),
                                        self._floats(0.0)])  # fmt: skip
        flags = self.tape.op_multi_out("Split", [used], {"axis": 0, "num_outputs": len(groups)}, num_outputs=len(groups))
        columns = self.tape.op_multi_out("Split", [self.gates], {"axis": 1, "num_outputs": len(groups)}, num_outputs=len(groups))
        rows = self.tape.op("Shape", [self.x], {"start": 0, "end": 1})
        shape = self.tape.op("Concat", [rows, self._ints([groups[0][-1].shape[1]])], {"axis": 0})
        y = self.tape.op("Expand", [self._floats(0.0), shape])
        for e, weights in enumerate(groups):
            condition = self.tape.op("Squeeze", [flags[e], self._ints([0])])
            branches = {"then_branch": self._expert(e, y, columns[e], weights), "else_branch": self._pass_on(e, y)}
            y = self.tape.op("If", [condition], branches)
        return y

    def _expert(self, e: int, y: Any, column: Any, weights: list[Any]) -> Any:
        """y plus this expert for the tokens that use it."""
        ir, tape = self.ir, self.ir.tape.Tape()
        flat = tape.op("Squeeze", [column, self._ints([1], tape)])
        rows = tape.op("Transpose", [tape.op("NonZero", [flat])], {"perm": [1, 0]})  # [n, 1]
        h = tape.op("MatMul", [tape.op("GatherND", [self.x, rows]), weights[0]])
        h = self._activate(tape, h, weights[1] if self.biased else None)
        out = tape.op("Mul", [tape.op("MatMul", [h, weights[-1]]), tape.op("GatherND", [column, rows])])
        total = tape.op("ScatterND", [y, rows, out], {"reduction": "add"})
        return self._graph(ir, tape, total, f"{self.prefix}_expert_{e}")

    def _pass_on(self, e: int, y: Any) -> Any:
        tape = self.ir.tape.Tape()
        return self._graph(self.ir, tape, tape.op("Identity", [y]), f"{self.prefix}_without_{e}")

    def _graph(self, ir: Any, tape: Any, output: Any, name: str) -> Any:
        for index, node in enumerate(tape.nodes):  # names are global: give each branch its own
            for i, value in enumerate(node.outputs):
                value.name = f"{name}_{index}_{i}"
        return ir.Graph([], [output], nodes=tape.nodes, name=name)

    def _activate(self, tape: Any, h: Any, bias: Any) -> Any:
        if bias is not None:
            if self.activation == "gelu" and not self.gated:
                return tape.op("BiasGelu", [h, bias], domain=MICROSOFT)
            h = tape.op("Add", [h, bias])
        if not self.gated:
            return self._function(tape, h)
        gate, up = tape.op_multi_out("Split", [h], {"axis": 1, "num_outputs": 2}, num_outputs=2)
        return tape.op("Mul", [self._function(tape, gate), up])

    def _function(self, tape: Any, x: Any) -> Any:
        name = self.activation
        if name in _DIRECT:
            op, domain, attributes = _DIRECT[name]
            return tape.op(op, [x], attributes, domain=domain)
        if name == "identity":
            return x
        if name == "relu2":
            r = tape.op("Relu", [x])
            return tape.op("Mul", [r, r])
        raise NotImplementedError(f"the activation {name!r} of an expert")

    def _ints(self, values: list[int], tape: Any = None) -> Any:
        return (tape or self.tape).op("Constant", [], {"value": self.ir.tensor(np.array(values, np.int64))})

    def _floats(self, value: float) -> Any:
        return self.tape.op("Constant", [], {"value": self.ir.tensor(np.array(value, np.float32))})


_DIRECT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "relu": ("Relu", "", {}), "sigmoid": ("Sigmoid", "", {}), "tanh": ("Tanh", "", {}), "gelu": ("Gelu", MICROSOFT, {}),
    "gelu_tanh": ("FastGelu", MICROSOFT, {}), "silu": ("QuickGelu", MICROSOFT, {"alpha": 1.0}),
    "quick_gelu": ("QuickGelu", MICROSOFT, {"alpha": 1.702}), "mish": ("Mish", "", {}), "elu": ("Elu", "", {}),
    "softplus": ("Softplus", "", {}), "hardswish": ("HardSwish", "", {}), "leaky_relu": ("LeakyRelu", "", {"alpha": 0.01}),
    "selu": ("Selu", "", {}),
}  # fmt: skip
