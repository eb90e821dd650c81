"""Logits and greedy text of a GGUF file by llama.cpp, in a process of its own: native code that crashes there is an error here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.hf.check import NEW_TOKENS, prompt

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations

PACKAGES = {"cyllama": "cyllama", "llama_cpp": "llama-cpp-python"}
"""What brings llama.cpp, module -> package: cyllama in its wheels, llama-cpp-python is compiled when it is installed."""

# Each makes `step(ids) -> logits [len(ids), vocabulary]`, the ids read after those of the steps before. In both weights are not repacked
# for AMX, for llama.cpp then crashes on virtual machines that report AMX, and keys and values are kept in float32.
_STEP = {
    "llama_cpp": """
import llama_cpp
defaults = llama_cpp.llama_cpp.llama_model_default_params
def plain():
    params = defaults(); params.use_extra_bufts = False; return params
llama_cpp.llama_cpp.llama_model_default_params = plain
model = llama_cpp.Llama(file, n_ctx=size, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True, type_k=0, type_v=0)
def step(ids):
    start = model.n_tokens
    model.eval(ids)
    return numpy.array(model.scores[start : start + len(ids)])
""",
    "cyllama": """
from cyllama.llama import llama_cpp
llama_cpp.ggml_backend_load_all()
params = llama_cpp.LlamaModelParams()
params.use_extra_bufts, params.n_gpu_layers = False, 0
class Model(llama_cpp.LlamaModel):
    n_vocab = property(lambda model: model.get_vocab().n_vocab)  # which get_logits_ith of cyllama 0.2 reads, and which is not there
model = Model(file, params, verbose=False)
params = llama_cpp.LlamaContextParams()
params.n_ctx = params.n_batch = params.n_ubatch = size
params.n_threads = params.n_threads_batch = 1
params.type_k = params.type_v = params.flash_attn_type = 0
context = llama_cpp.LlamaContext(model, params, verbose=False)
place = 0
def step(ids):
    global place
    batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
    for i, token in enumerate(ids):
        batch.add(token, place + i, [0], True)
    context.decode(batch)
    place += len(ids)
    return numpy.array([context.get_logits_ith(i) for i in range(len(ids))], numpy.float32)
""",
}
_SCRIPT = """
import sys, numpy
file, given, new, result = sys.argv[1:]
ids = numpy.load(given).tolist()
size, new = len(ids) + int(new) + 8, int(new)
{step}
logits = [step(ids)]
for _ in range(new):
    ids.append(int(logits[-1][-1].argmax()))
    logits.append(step(ids[-1:]))
numpy.savez(result, ids=ids, logits=numpy.concatenate(logits))
"""


def available() -> str | None:
    """The first of :data:`PACKAGES` that is installed."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)


def compare(graph: Graph, file: Path, tokenizer: Any | None = None) -> dict[str, Any]:
    """Greedy text of llama.cpp, and the logits of both along it.

    Returns:
        ``class``; ``relative_error`` and ``median_error`` of the logits, largest difference over largest value at the worst and the median
        position of the prompt and the text; ``greedy_tokens`` and ``greedy_equal`` as of :func:`dyncomp.backends.hf.check.compare`.

    Raises:
        BackendError: llama.cpp is not installed, crashed, or cannot load the file.
    """
    if (package := available()) is None:
        raise BackendError("gguf: no package here brings llama.cpp", hint=f"install one of {', '.join(PACKAGES.values())}")
    ids = prompt(graph, tokenizer)
    start = ids.shape[1]
    new = max(1, min(NEW_TOKENS, int(graph.info.get("context_length") or 1 << 30) - start))
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "ids.npy", Path(folder) / "result.npz"
        np.save(given, ids[0].numpy())
        script = _SCRIPT.format(step=_STEP[package])
        done = subprocess.run(
            [sys.executable, "-c", script, str(file), str(given), str(new), str(result)], capture_output=True, text=True, timeout=600
        )
        if done.returncode or not result.is_file():
            lines = done.stderr.strip().splitlines() or ["no message"]
            last = next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])  # more may follow an exception
            raise BackendError(f"gguf: llama.cpp does not run what was written (exit code {done.returncode}): {last}")
        with np.load(result) as found:
            text, theirs = torch.from_numpy(found["ids"])[None], torch.from_numpy(found["logits"])
    with torch.no_grad(), float_activations(graph):
        ours = graph(text)[0].float()
    same = (ours[start - 1 : -1].argmax(-1) == text[0, start:]).long()
    errors = (theirs - ours).abs().amax(1) / ours.abs().max()
    return {
        "class": "llama.cpp", "relative_error": float(errors.max()), "median_error": float(errors.median()),
        "greedy_tokens": new, "greedy_equal": int(same.cumprod(0).sum()),
    }  # fmt: skip
