"""Generate text from a bundle's artifact with onnxruntime alone: no torch, no dyncomp.

python examples/onnxruntime_only.py demo/artifacts/ort 504 3575 282 4649 314     (token ids of a prompt)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def generate(folder: str, ids: list[int], new_tokens: int = 16) -> list[int]:
    """Greedy continuation of ``ids``; the KV cache is one buffer per layer, bound as input and output."""
    config = json.loads((Path(folder) / "config.json").read_text())
    options = onnxruntime.SessionOptions()
    if (kernels := Path(folder) / "dyncomp_ort.so").exists():  # of a quantized model
        options.register_custom_ops_library(str(kernels))
    session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options)
    capacity = min(len(ids) + new_tokens, config["kv_cache"]["context_length"])
    sizes = {"batch": 1, "capacity": capacity}
    caches = {
        spec["name"]: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros([sizes.get(d, d) for d in spec["shape"]], spec["dtype"]))
        for spec in config["inputs"]
        if "_cache_" in spec["name"]
    }
    out, past, step = [], 0, np.array([ids], np.int64)
    while len(out) < new_tokens and past + step.shape[1] < capacity:
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", step)
        binding.bind_cpu_input("past_length", np.array([past], np.int64))
        binding.bind_cpu_input("chosen", np.array([[step.shape[1] - 1]], np.int64))
        binding.bind_output(config["outputs"][0])
        for name, cache in caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(f"new_{name}", cache)
        session.run_with_iobinding(binding)
        past += step.shape[1]
        out.append(int(binding.get_outputs()[0].numpy().argmax()))
        step = np.array([[out[-1]]], np.int64)
    return out


if __name__ == "__main__":
    print(*generate(sys.argv[1], [int(token) for token in sys.argv[2:]]))
