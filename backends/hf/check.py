"""Holding a written checkpoint against the graph it was made from, with nothing but stock classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.models.extras import quiet

PROMPT = "The history of the river begins with"
NEW_TOKENS = 64


def load_stock(folder: Path) -> Any:
    """The checkpoint through ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        BackendError: a tensor is missing or unexpected.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype="auto"
        )
    model, report = loaded
    wrong = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    if wrong:
        raise BackendError(f"hf: {type(model).__name__} does not load what was written: {wrong}", hint="this is a defect: please report it")
    return model.eval()


def compare(graph: Graph, folder: Path, tokenizer: Any | None) -> dict[str, Any]:
    """Greedy text of the stock class, and the logits of both along it.

    Returns:
        ``class``; ``relative_error`` of the logits (largest difference over largest value) at all positions of the prompt and the text, and
        ``median_error``, that of half of the positions: where two experts score alike to the last digits the other one may run, and
        these positions (and a little those after them) then differ by more than rounding;
        ``greedy_tokens`` generated and ``greedy_equal``, how many of them in a row from the start our graph would have chosen too.
    """
    model = load_stock(folder)
    ids = _prompt(graph, tokenizer)
    limit = int(graph.info.get("context_length") or 1 << 30)
    new = max(1, min(NEW_TOKENS, limit - ids.shape[1]))
    with torch.no_grad(), quiet():
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        theirs = model(text).logits.float()
    with torch.no_grad(), float_activations(graph):
        ours = graph(text).float()
    start = ids.shape[1]
    same = (ours[0, start - 1 : -1].argmax(-1) == text[0, start:]).long()
    errors = (theirs - ours).abs().amax((0, 2)) / ours.abs().max()  # of each position
    return {
        "class": type(model).__name__,
        "relative_error": float(errors.max()),
        "median_error": float(errors.median()),
        "greedy_tokens": int(text.shape[1] - start),
        "greedy_equal": int(same.cumprod(0).sum()),
    }


def _prompt(graph: Graph, tokenizer: Any | None) -> Tensor:
    if tokenizer is not None:
        return torch.tensor([tokenizer(PROMPT)["input_ids"]])
    table = next(n for n in graph.nodes if n.target is torch.ops.aten.embedding.default)
    vocabulary = int(graph.tensor(table.args[0]).shape[0])  # type: ignore[arg-type]
    return torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
