"""Measure what docs/large_models.md shows: what converting larger and larger models takes. Never edit that file by hand.

    python -m bench.memory [--only TEXT …] [--minutes N] [--again] [--list]

Each row makes a random Llama of real shapes in bfloat16 with a small tokenizer, converts it in a process of its own, and removes both.
They go into the folder DYNCOMP_SCRATCH (else TMPDIR), which must be on a disk and hold about 25 bytes a parameter. A row is stored in
docs/large_models.json as soon as it is measured, and rows that are there already are not measured again.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench import rowwise
from dyncomp.bundle import versions
from dyncomp.convert import LOWERED, WHOLE, ConvertRequest, convert
from dyncomp.text import load_text

TOKENS, WINDOWS, CONTEXT = 2048, 1, 512
VOCABULARY = 4096  # of the tokenizer; the rest of the model's is never seen
CHARACTERS = 60_000  # of text, to train the tokenizer on, and to calibrate and evaluate on


@dataclass(frozen=True)
class Shape:
    """A Llama: like which one, and its sizes."""

    like: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


SHAPES = {
    "0.1B": Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 49_152),
    "0.4B": Shape("SmolLM2-360M", 960, 2560, 32, 15, 5, 49_152),
    "1B": Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8, 128_256),
    "3B": Shape("Llama-3.2-3B", 3072, 8192, 28, 24, 8, 128_256),
}
WORK: dict[str, dict[str, Any]] = {"int8": {"recipe": "dense", "quantize": "int8"}, "experts": {"recipe": "experts", "active": 0.75}}


@dataclass(frozen=True)
class Row:
    size: str
    work: str
    low: bool


def rows() -> dict[str, Row]:
    found = [Row(size, work, low) for work in WORK for size in SHAPES for low in (False, True)]
    return {f"{r.work} {r.size} {'low memory' if r.low else 'whole'}": r for r in found}


def write_checkpoint(shape: Shape, folder: Path) -> int:
    """A random model as ``save_pretrained`` lays it out, a shard a layer, so that it never is in memory; returns its parameters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, head_dim=shape.hidden // shape.heads, vocab_size=shape.vocabulary, tie_word_embeddings=True,
        max_position_embeddings=CONTEXT, architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, value in parameters.items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        shards.setdefault(f"model-{layer.group(1) if layer else 'rest'}.safetensors", {})[name] = value.shape
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    for file, shapes in shards.items():
        tensors = {n: torch.ones(s) if len(s) == 1 else torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
        save_file({n: t.bfloat16() for n, t in tensors.items()}, str(folder / file), {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, shapes in shards.items() for name in shapes}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    text = "\n\n\n".join(load_text(None).documents)[:CHARACTERS]
    (folder / "text.txt").write_text(text)
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>").save_pretrained(folder)
    return sum(value.numel() for value in parameters.values())


def measure(row: Row) -> dict[str, Any]:
    scratch = os.environ.get("DYNCOMP_SCRATCH")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="memory-") as folder:
        parameters = alone(write_checkpoint, SHAPES[row.size], Path(folder) / "model")
        return {"parameters": parameters, "versions": versions()} | alone(_convert, Path(folder), row)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _convert(folder: Path, row: Row) -> dict[str, Any]:
    private, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            private[0] = max(private[0], _private_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    request = ConvertRequest(
        model=str(folder / "model"), out=folder / "out", calibrate=str(folder / "model" / "text.txt"), tokens=TOKENS, windows=WINDOWS,
        other=None, backend="torch", low_memory=row.low, **WORK[row.work],
    )  # fmt: skip
    report = convert(request)
    done.set()
    watcher.join()
    kept = {key: report[key] for key in ("seconds", "cpu_seconds", "peak_rss_bytes", "perplexity")}
    return kept | {"private_bytes": private[0], "threads": torch.get_num_threads()}


def _private_bytes() -> int:
    """Memory of this process that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


_TEXT = f"""
# Models larger than memory

Written by `python -m bench.memory`; do not edit.

`dyncomp convert MODEL -o OUT --low-memory` keeps weights in files beside `OUT`, mapped into memory. A directory's safetensors are mapped;
what is not float32 there is converted tensor by tensor into a nameless file on the disk of `OUT`, and the tensors that passes make go into
such files too. Calibration, fits and evaluation take all windows through half a gigabyte of weights before they read the next, and pages
of files are given back once more than a gigabyte of them is in memory. What remains is the residual stream of the tokens and what a pass
needs for one layer. The result has the same bits as without. The files are gone when the conversion ends, or is interrupted.

It is the default for a directory where {WHOLE} times its weights in float32 are more than the memory available (`--no-low-memory`: never).
Lowering and timing an artifact is then refused by name where {LOWERED} times the weights are not available; `--backend torch` makes the
bundle without one. The disk must hold the checkpoint, its float32 copy, the new tensors and the bundle: about 13 bytes a parameter for
int8, 25 for experts and their baseline. Other sources (GGUF, factories, hubs) are in memory once, while they are loaded. `heal` keeps in
memory what training needs.

Random Llamas of the shapes of real ones in bfloat16, {TOKENS} calibration tokens, {WINDOWS} window of {CONTEXT} tokens to evaluate on.
*Peak memory* is the largest resident set, pages of mapped files included; *private* is the part that is no page of a file. *int8* rounds
every weight; *experts* carves, fits routers, refits, and makes static pruning to stand beside. *Whole* is `--no-low-memory`. Seconds
depend on what else the machine and its disk do, CPU seconds less.

| conversion | like | parameters | checkpoint | | peak memory | private | CPU seconds | seconds | threads |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(results: dict[str, Any]) -> str:
    lines = [_line(row, results["rows"][key]) for key, row in rows().items() if key in results["rows"]]
    return _TEXT.lstrip() + "\n".join(lines) + "\n"


def _line(row: Row, found: dict[str, Any]) -> str:
    parameters = found["parameters"]
    cells = [
        row.work, SHAPES[row.size].like, f"{parameters / 1e9:.2f} B", f"{2 * parameters / 2**30:.1f} GiB",
        "low memory" if row.low else "whole", f"{found['peak_rss_bytes'] / 2**30:.1f} GiB", f"{found['private_bytes'] / 2**30:.1f} GiB",
        f"{found['cpu_seconds']:.0f}", f"{found['seconds']:.0f}", str(found["threads"]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(arguments: Sequence[str] | None = None) -> None:
    rowwise.main(__doc__, "large_models.json", rows(), measure, markdown, arguments)


if __name__ == "__main__":
    main()
