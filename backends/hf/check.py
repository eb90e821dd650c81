"""Holding a written checkpoint against the graph it was made from, with nothing but stock classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.hf.architectures import Architecture
from torch import Tensor

from dyncomp.errors import BackendError
from dyncomp.graph import Graph
from dyncomp.interpret import float_activations
from dyncomp.models.extras import quiet
from dyncomp.regions.decoder import Decoder
from dyncomp.regions.routed import RoutedFFN
from dyncomp.regions.router import TopK, find_scores
from dyncomp.sweep import Sweep

PROMPT = "The history of the river begins with"
NEW_TOKENS = 64
TIE = 1e-5
"""Of the largest score, below which two differ by rounding: what thirty layers of SmolLM2 in float32 leave of a router's input is 1e-6."""


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


def compare(decoder: Decoder, architecture: Architecture, folder: Path, tokenizer: Any | None) -> dict[str, Any]:
    """Greedy text of the stock class, and the logits of both along it.

    Returns:
        ``class``; ``relative_error`` of the logits (largest difference over largest value) at the worst position of the prompt and the
        text, and ``median_error``, that of half of the positions;
        ``greedy_tokens`` generated and ``greedy_equal``, how many of them in a row from the start our graph would have chosen too.
        Of routed models also ``ties``, at how many of the ``positions`` the class ran experts that score like others to the last digits of
        float32, where our graph was made to run the same ones; and ``other_experts``, at how many some layer runs other experts than in our
        graph all the same.
    """
    from transformers import GenerationConfig

    graph, model = decoder.graph, load_stock(folder)
    ids = prompt(graph, tokenizer)
    limit = int(graph.info.get("context_length") or 1 << 30)
    new = max(1, min(NEW_TOKENS, limit - ids.shape[1]))
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)  # whatever the checkpoint's own says
    model.generation_config = greedy
    with torch.no_grad(), quiet():
        text = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
        with _chosen_experts(model, decoder, architecture) as chosen:
            theirs = model(text).logits.float()
    with torch.no_grad(), float_activations(graph):
        ours, gates, ties = _run(decoder, text, chosen)
    start = ids.shape[1]
    same = (ours[0, start - 1 : -1].argmax(-1) == text[0, start:]).long()
    errors = (theirs - ours).abs().amax((0, 2)) / ours.abs().max()  # of each position
    record = {
        "class": type(model).__name__,
        "relative_error": float(errors.max()),
        "median_error": float(errors.median()),
        "greedy_tokens": int(text.shape[1] - start),
        "greedy_equal": int(same.cumprod(0).sum()),
    }
    if not gates:
        return record
    other = torch.stack(
        [(_opened(chosen[layer], value.shape[-1]) != value).any(-1) for layer, value in gates.items()]
    )  # [layers, positions]
    return record | {"positions": int(text.shape[1]), "ties": int(ties.sum()), "other_experts": int(other.any(0).sum())}


@contextmanager
def _chosen_experts(model: Any, decoder: Decoder, architecture: Architecture) -> Iterator[dict[int, Tensor]]:
    """By layer, [positions, k] int64: the experts that the class's routers choose in the forward passes within."""
    chosen: dict[int, Tensor] = {}

    def note(layer: int) -> Callable[..., None]:
        return lambda module, given, result: chosen.update({layer: next(t for t in result if not t.is_floating_point())})

    router = architecture.router.removesuffix(".weight")
    routed = [i for i, layer in enumerate(decoder.layers) if isinstance(layer.ffn, RoutedFFN)]
    hooks = [model.get_submodule(f"model.layers.{i}.{router}").register_forward_hook(note(i)) for i in routed]
    try:
        yield chosen
    finally:
        for hook in hooks:
            hook.remove()


def _run(decoder: Decoder, ids: Tensor, chosen: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor], Tensor]:
    """Our graph's logits; by layer which of the experts that are not shared run, bool [positions, E]; where ties were settled as the class
    did, bool [positions].

    Two programs that are both right round differently, and of experts that score alike to the last digits they run different ones:
    there is no telling an error from that but by following the class's choice.
    """
    graph, opened = decoder.graph, {}
    ties = torch.zeros(ids.shape[1], dtype=torch.bool)
    sweep = Sweep(graph, [{graph.inputs[0].name: ids}])
    for index, layer in enumerate(decoder.layers):
        if not isinstance(layer.ffn, RoutedFFN):
            continue
        router = decoder.routed(layer).router
        assert isinstance(router, TopK)
        scores = find_scores(graph, layer.ffn)
        if scores is not None and router.bias is None and router.weighting.groups == 1:
            (found,) = sweep.advance(scores)
            settled, tied = settle_ties(found, chosen[index], router.shared)
            sweep.provide(scores, [settled])
            ties |= tied
        (gates,) = sweep.advance(layer.ffn.gates)
        opened[index] = gates.flatten(0, -2)[:, router.shared :] != 0
    (logits,) = sweep.advance(graph.output_nodes[0])
    return logits.float(), opened, ties


def settle_ties(scores: Tensor, chosen: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Scores [1, S, E] by which the ``chosen`` experts [S, k] are the best, where the others score higher by rounding alone (:data:`TIE`
    of the largest), and where that was so, bool [S]; all other scores stay as they are. The ``shared`` first experts are not counted."""
    own = scores.flatten(0, -2)[:, shared:]
    theirs = _opened(chosen, own.shape[1])
    lowest = own.masked_fill(~theirs, torch.inf).amin(-1, keepdim=True)
    highest = own.masked_fill(theirs, -torch.inf).amax(-1, keepdim=True)
    tied = (lowest <= highest) & (highest - lowest <= TIE * own.abs().amax(-1, keepdim=True))
    above = torch.nextafter(highest, torch.full_like(highest, torch.inf))
    settled = torch.where(tied & theirs, own.maximum(above), own)
    return torch.cat([scores[..., :shared], settled.view(*scores.shape[:-1], -1)], -1), tied[:, 0]


def _opened(chosen: Tensor, experts: int) -> Tensor:
    """[positions, k] experts -> bool [positions, E]."""
    return torch.zeros(len(chosen), experts, dtype=torch.bool).scatter(1, chosen, True)


def prompt(graph: Graph, tokenizer: Any | None) -> Tensor:
    """[1, n] ids of :data:`PROMPT`, or random ones where there is no tokenizer."""
    if tokenizer is not None:
        return torch.tensor([tokenizer(PROMPT)["input_ids"]])
    table = next(n for n in graph.nodes if n.target is torch.ops.aten.embedding.default)
    vocabulary = int(graph.tensor(table.args[0]).shape[0])  # type: ignore[arg-type]
    return torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
