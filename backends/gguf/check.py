"""Logits of a GGUF file by llama.cpp, computed in a process of its own: native code that crashes there is an error here."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations

_SCRIPT = """
import sys, llama_cpp, numpy
defaults = llama_cpp.llama_cpp.llama_model_default_params
def plain():
    # No weights repacked for AMX: llama.cpp then crashes on virtual machines that report AMX.
    params = defaults(); params.use_extra_bufts = False; return params
llama_cpp.llama_cpp.llama_model_default_params = plain
ids = numpy.load(sys.argv[2]).tolist()
model = llama_cpp.Llama(sys.argv[1], n_ctx=len(ids) + 8, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True)
model.eval(ids)
numpy.save(sys.argv[3], model.scores[: len(ids)])
"""


def compare(graph: Graph, file: Path, tokens: int = 64) -> dict[str, Any]:
    """Relative error of llama.cpp's logits on random tokens: largest difference over largest value, at the worst and the median position.

    Raises:
        BackendError: llama.cpp crashed, or cannot load the file.
    """
    table = next(n for n in graph.nodes if n.target is torch.ops.aten.embedding.default)
    vocabulary = int(graph.tensor(table.args[0]).shape[0])  # type: ignore[arg-type]
    ids = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "ids.npy", Path(folder) / "logits.npy"
        np.save(given, ids[0].numpy())
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(file), str(given), str(result)], capture_output=True, text=True, timeout=600
        )
        if done.returncode or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BackendError(f"gguf: llama.cpp does not run what was written (exit code {done.returncode}): {last}")
        theirs = torch.from_numpy(np.load(result)).float()
    with torch.no_grad(), float_activations(graph):
        ours = graph(ids)[0].float()
    errors = (theirs - ours).abs().amax(1) / ours.abs().max()
    return {"class": "llama.cpp", "relative_error": float(errors.max()), "median_error": float(errors.median())}
