"""A folder that onnxruntime-genai runs: the ONNX model with the inputs it feeds, and ``genai_config.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.ort.lower import LIBRARY, MODEL, lower
from torch import fx

from dyncomp.errors import BackendError
from dyncomp.graph import Graph, TensorSpec
from dyncomp.ops import cached_attention
from dyncomp.runtime.generate import end_tokens

aten = torch.ops.aten
CONFIG = "genai_config.json"
PAST, PRESENT = "past_key_values.%d.{}", "present.%d.{}"


def write(graph: Graph, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Write the model, its weights and kernels, and the configuration; the tokenizer's files are not written.

    Args:
        graph: with a KV cache and ``chosen`` logits.
        tokenizer: says which tokens begin, end and pad a text.

    Returns:
        the configuration.

    Raises:
        BackendError: the caches are of a kind that onnxruntime-genai does not allocate, or the text has no end.
    """
    fed = feed_by_mask(graph)
    config = configuration(fed, tokenizer)
    lower(fed, folder)
    if (folder / LIBRARY).is_file():
        config["model"]["decoder"]["session_options"]["custom_ops_library"] = LIBRARY
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    return config


def feed_by_mask(graph: Graph) -> Graph:
    """A copy that takes what onnxruntime-genai feeds, and gives the logits of each row's last token.

    before:  (input_ids [B, S], past_length [B], chosen [B, P], key_cache_0 [B, Hkv, C, D], value_cache_0, …)
             -> logits [B, P, V], new_key_cache_0, new_value_cache_0, …
    after:   (input_ids [B, S], attention_mask [B, past + S], past_key_values.0.key [B, Hkv, C, D], past_key_values.0.value, …)
             -> logits [B, 1, V], present.0.key, present.0.value, …

    Both pad rows on the right of the prompt only, and write the next token over the padding: a row has as many tokens as its mask has
    ones. Positions count from there, so ``position_ids`` is no input.
    """
    fed = graph.copy()
    g = fed.module.graph
    ids, past_length, chosen = fed.placeholders[:3]
    with g.inserting_after(ids):
        mask = g.placeholder("attention_mask")
    with g.inserting_before(next(n for n in g.nodes if n.op == "call_function")):
        new = g.call_function(aten.sym_size.int, (ids, 1))
        tokens = g.call_function(aten.sum.dim_IntList, (mask, [1]))  # [B]
        past = g.call_function(aten.clamp_min.default, (g.call_function(aten.sub.Tensor, (tokens, new)), 0))  # a padded prompt has none
        last = g.call_function(aten.sub.Tensor, (g.call_function(aten.sub.Tensor, (tokens, past)), 1))
        last = g.call_function(aten.unsqueeze.default, (last, 1))  # [B, 1]
    for old, computed in ((past_length, past), (chosen, last)):
        old.replace_all_uses_with(computed)
        g.erase_node(old)
    batch = fed.inputs[0].shape[0]
    renamed = [TensorSpec(_name(s.name, PAST), s.dtype, s.shape) for s in fed.inputs[3:]]
    fed.inputs = (fed.inputs[0], TensorSpec("attention_mask", torch.int64, (batch, "total")), *renamed)
    fed.outputs = ("logits", *(_name(o.removeprefix("new_"), PRESENT) for o in fed.outputs[1:]))
    fed.clean()
    fed.infer_shapes()
    return fed


def _name(cache: str, pattern: str) -> str:
    """``value_cache_3`` as onnxruntime-genai calls it."""
    kind, _, layer = cache.split("_")
    return pattern.format(kind) % int(layer)


def configuration(graph: Graph, tokenizer: Any) -> dict[str, Any]:
    """``genai_config.json`` of what :func:`feed_by_mask` gives.

    The type is ``decoder``: with those of families onnxruntime-genai would do what is in the graph already (long rotary embeddings), or
    look for inputs that it does not have.
    """
    cache, layers = graph.info["kv_cache"], graph.info["kv_cache"]["layers"]
    if "bits" in cache:
        raise BackendError(
            f"the KV cache is in int{cache['bits']}; onnxruntime-genai allocates one in float",
            hint="use --backend ort, or convert without --kv-cache",
        )
    for index, layer in enumerate(layers):
        if layer["key_dim"] != layer["value_dim"]:
            raise BackendError(
                f"attention {index} keeps keys of {layer['key_dim']} and values of {layer['value_dim']} features; onnxruntime-genai "
                "allocates both alike",
                hint="use --backend ort",
            )
    ends = sorted(end_tokens(tokenizer))
    if not ends:
        raise BackendError("the tokenizer names no token that ends a text; onnxruntime-genai needs one", hint="use --backend ort")
    begin, pad = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "pad"))
    attention = next(n for n in graph.nodes if n.target is cached_attention._opoverload)
    query = attention.args[0]
    assert isinstance(query, fx.Node)
    kinds = ("key", "value")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL,
        "head_size": layers[0]["key_dim"],
        "num_attention_heads": int(query.meta["val"].shape[1]),
        "num_key_value_heads": layers[0]["kv_heads"],
        "num_hidden_layers": len(layers),
        "inputs": {n: n for n in ("input_ids", "attention_mask")} | {f"past_{kind}_names": PAST.format(kind) for kind in kinds},
        "outputs": {"logits": "logits"} | {f"present_{kind}_names": PRESENT.format(kind) for kind in kinds},
    }
    return {
        "model": {
            "type": "decoder",
            "context_length": cache["context_length"],
            "vocab_size": int(graph.output_nodes[0].meta["val"].shape[2]),
            "bos_token_id": ends[0] if begin is None else begin,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if pad is None else pad,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "min_length": 0, "max_length": cache["context_length"],
            "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "past_present_share_buffer": True,
        },
    }  # fmt: skip
