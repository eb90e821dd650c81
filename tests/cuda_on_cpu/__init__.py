"""Runs what TVM makes for CUDA on the CPU: the generated source, compiled by a C++ compiler, launched as the host code says."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from torch import Tensor
from tvm import sym, tirx

HERE = Path(__file__).parent
AXES = ["blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z"]
COMPILER = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)


@tvm.ir.instrument.pass_instrument
class _Split:
    """The module when host and device code have just been divided."""

    def run_after_pass(self, module: Any, info: Any) -> None:
        if info.name.endswith("SplitHostDevice"):
            self.module = module


def build(function: Any, target: Any) -> tuple[Any, str]:
    """The host's part of a function, and the CUDA source it launches."""
    split = _Split()
    with tvm.transform.PassContext(opt_level=3, instruments=[split]):
        made = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target=target)
    return split.module["main"], str(made.mod.imports[0].inspect_source())


def compiled(function: Any, target: Any, folder: Path) -> Callable[..., None]:
    """The function of tensors, which it changes."""
    host, source = build(function, target)
    launchers = []
    for name, parameters in re.findall(r"__global__ void \S+ (\w+)\(([^)]*)\) \{", source):
        kinds = [p.rsplit(" ", 1)[0].replace("__restrict__", "").strip() for p in parameters.split(",")]
        given = ", ".join(f"({k})a[{i}]" if k.endswith("*") else f"*({k}*)a[{i}]" for i, k in enumerate(kinds))
        launchers.append(
            f'extern "C" int launch_{name}(const int64_t* size, void** a) {{ return launch(size, [=] {{ {name}({given}); }}); }}'
        )
    folder.mkdir(parents=True, exist_ok=True)
    source = source.replace("__shared__ alignas(64)", "alignas(64) static")
    (folder / "kernels.cc").write_text("\n".join([source, *launchers]))
    command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-fPIC", "-shared", f"-I{HERE}", "-o", "kernels.so", "kernels.cc"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "kernels.so"))

    def run(*tensors: Tensor) -> None:
        Host(host, library).run([t.detach().numpy() for t in tensors])

    return run


class Host:
    """Does what host code says: allocates memory (filled with NaN), and launches kernels."""

    def __init__(self, function: Any, library: Any) -> None:
        self.function, self.library = function, library
        self.values: dict[Any, Any] = {}

    def run(self, arrays: list[np.ndarray[Any, Any]]) -> None:
        for parameter, array in zip(self.function.params, arrays, strict=True):
            self.values[parameter] = array
            for dim, size in zip(parameter.shape, array.shape, strict=True):
                if isinstance(dim, tirx.Var):
                    self.values[dim] = tirx.IntImm("int64", size)
                else:
                    assert int(dim) == size
        self.do(self.function.body)

    def number(self, expression: Any) -> int:
        analyzer = sym.Analyzer()
        for variable, number in self.values.items():
            if isinstance(number, tirx.IntImm):
                analyzer.bind(variable, number)
        return int(analyzer.simplify(expression))

    def do(self, statement: Any) -> None:
        if isinstance(statement, tirx.SeqStmt):
            for part in statement.seq:
                self.do(part)
        elif isinstance(statement, tirx.AllocBuffer):
            self.values[statement.buffer] = np.full(8 * self.number(statement.buffer.shape[0]) + 8, 0xFF, np.uint8)
        elif isinstance(statement, tirx.DeclBuffer):
            self.values[statement.buffer] = self.values[statement.data.args[0]]
        elif isinstance(statement, tirx.Bind):
            self.values[statement.var] = tirx.IntImm(str(statement.value.ty.dtype), self.number(statement.value))
        elif isinstance(statement, tirx.IfThenElse):
            taken = statement.then_case if self.number(statement.condition) else statement.else_case
            if taken is not None:
                self.do(taken)
        elif isinstance(statement, tirx.For):
            for i in range(self.number(statement.extent)):
                self.values[statement.loop_var] = tirx.IntImm(str(statement.extent.ty.dtype), i)
                self.do(statement.body)
        elif isinstance(statement, tirx.Evaluate):
            self.launch(statement.value)
        else:
            raise TypeError(f"the host does {type(statement).__name__}")

    def launch(self, call: Any) -> None:
        axes = list(call.attrs.launch_params)
        name, *given = call.args
        given, sizes = given[: -len(axes)], [self.number(n) for n in given[-len(axes) :]]
        assert min(sizes) > 0, "a GPU refuses a grid of nothing"
        size = (ctypes.c_int64 * 6)(*(sizes[axes.index(a)] if a in axes else 1 for a in AXES))
        assert size[3] * size[4] * size[5] <= 1024
        assert max(size[1], size[2]) <= 65535
        numbers = [None if "handle" in str(g.ty) else (ctypes.c_int64 * 1)(self.number(g)) for g in given]
        pointers = [self.values[g.args[0]].ctypes.data if n is None else ctypes.addressof(n) for g, n in zip(given, numbers, strict=True)]
        stuck = self.library[f"launch_{name.value}"](size, (ctypes.c_void_p * len(pointers))(*pointers))
        assert not stuck, f"{name}: not all threads of a block reach a barrier"
