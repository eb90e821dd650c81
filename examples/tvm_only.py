"""Generate text from a bundle's artifact with TVM's runtime alone: no torch, no dyncomp, and no compiler.

python examples/tvm_only.py demo/artifacts/tvm 504 3575 282 4649 314     (token ids of a prompt)

Only the packages apache-tvm and apache-tvm-ffi are needed, and of the former only libtvm_runtime.so: `import tvm` would take seconds.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ALIGNMENT = 64  # TVM reads whole vectors: memory that begins elsewhere would crash it


def aligned(shape: list[int], dtype: str) -> np.ndarray:
    """Zeros that begin at a multiple of 64 bytes."""
    count = max(int(np.prod(shape)), 1)
    memory = np.zeros(count * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : len(memory) - ALIGNMENT + start].view(dtype).reshape(shape)


def runtime() -> Any:
    """The package ``tvm_ffi``, with TVM's runtime library loaded."""
    if "torch" not in sys.modules:
        sys.modules["torch"] = None  # tvm_ffi imports it where it is installed, and does without where it is not
    import tvm_ffi

    if sys.modules["torch"] is None:
        del sys.modules["torch"]
    folder = Path(importlib.util.find_spec("tvm").origin).parent
    ctypes.CDLL(str(folder / "lib" / "libtvm_runtime.so"), mode=ctypes.RTLD_GLOBAL)
    return tvm_ffi


def generate(folder: str, ids: list[int], new_tokens: int = 16) -> list[int]:
    """Greedy continuation of ``ids``; the KV cache is one array per layer, written in place."""
    ffi, place = runtime(), Path(folder)
    config = json.loads((place / "config.json").read_text())
    module = ffi.load_module(str(place / "model.so"))
    if (kernels := place / "dyncomp_tvm.so").exists():  # of a quantized model
        module.import_module(ffi.load_module(str(kernels)))
    machine = module["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2, 1, 0, 2)  # on the CPU, with an allocator that keeps memory for the next call
    memory = aligned([(place / "parameters.bin").stat().st_size], "uint8")
    memory[:] = np.fromfile(place / "parameters.bin", np.uint8)
    parameters = []
    for entry in config["parameters"]:
        size = int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize
        value = memory[entry["offset"] : entry["offset"] + size].view(entry["dtype"])
        parameters.append(ffi.from_dlpack(value.reshape(entry["shape"])))
    capacity = min(len(ids) + new_tokens, config["kv_cache"]["context_length"])
    sizes = {"batch": 1, "capacity": capacity}
    caches = {
        spec["name"]: aligned([sizes.get(d, d) for d in spec["shape"]], spec["dtype"])
        for spec in config["inputs"]
        if "_cache_" in spec["name"]
    }
    out, past, step = [], 0, ids
    while len(out) < new_tokens and past + len(step) < capacity:
        given = dict(caches)
        for name, values in (("input_ids", [step]), ("past_length", [past]), ("chosen", [[len(step) - 1]])):
            given[name] = aligned(list(np.shape(values)), "int64")
            given[name][...] = values
        inputs = [ffi.from_dlpack(given[spec["name"]]) for spec in config["inputs"]]
        logits = np.from_dlpack(machine["main"](*inputs, *parameters)[0])
        past += len(step)
        out.append(int(logits[0, 0].argmax()))
        step = out[-1:]
    return out


if __name__ == "__main__":
    print(*generate(sys.argv[1], [int(token) for token in sys.argv[2:]]))
