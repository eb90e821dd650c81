"""A decoder as a GGUF file, for llama.cpp and what is built on it.

Tensors are those of a stock architecture (:mod:`dyncomp.backends.hf.tensors`) under GGUF's names. Weights that are kept in few bits go
into the file as the codes they are where a GGUF format holds them exactly: symmetric int8 in blocks of 32 is Q8_0, int4 with offsets in
blocks of 32 is Q4_1. Everything else is F32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dyncomp.backends.hf.architectures import Architecture
from dyncomp.backends.hf.shape import Shape
from dyncomp.backends.hf.tensors import tensors
from torch import Tensor

from dyncomp.errors import BackendError
from dyncomp.models.gguf_file import GgufFile
from dyncomp.quantized import Quantized, pack_nibbles
from dyncomp.regions.decoder import Decoder

NAMES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "granite-moe": "GRANITE_MOE"}
"""Our name of an architecture -> gguf's."""
_INTERLEAVED = ("llama", "granite-moe")  # llama.cpp rotates neighbouring features there: rows of queries and keys change places


def write(
    decoder: Decoder, shape: Shape, architecture: Architecture, file: Path, *, temper: int, tokenizer: GgufFile | None
) -> dict[str, int]:
    """Write the file; returns how many tensors went into it in each format.

    Args:
        tokenizer: the header of the GGUF file the model came from, whose vocabulary is taken over; None writes none.

    Raises:
        BackendError: GGUF has no such architecture, or no such rotary embedding.
    """
    import gguf

    if architecture.name not in NAMES:
        raise BackendError(f"gguf: {architecture.name} is not written", hint=f"architectures: {', '.join(NAMES)}")
    if decoder.rope.theta is None:
        raise BackendError("gguf: scaled rotary embeddings are not written", hint="only one base for all frequencies")
    kind = gguf.MODEL_ARCH[NAMES[architecture.name]]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[kind])
    _header(writer, decoder, shape, architecture, tokenizer)
    codes = _codes(decoder)
    counts: dict[str, int] = {}
    for name, value in _parts(tensors(architecture, decoder, shape, temper, torch.float32)):
        if name == "lm_head.weight" and decoder.tied:
            continue
        target = gguf_name(name)
        quantized = codes.get(name)
        if architecture.name in _INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
            order = _interleaved(shape.heads if ".q_proj." in name else shape.kv_heads, shape.head_dim)
            value, quantized = value[order], None if quantized is None else _rows(quantized, order)
        if quantized is not None and torch.equal(quantized.decode(), value) and (stored := encode(quantized)) is not None:
            data, form = stored
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[form])
        else:
            form = "F32"
            writer.add_tensor(target, value.numpy())
        counts[form] = counts.get(form, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def encode(value: Quantized) -> tuple[np.ndarray[Any, Any], str] | None:
    """(bytes [..., rows, bytes of a row], name of the format) of codes that a GGUF format holds as they are; else None."""
    if value.block != 32 or (value.bits == 8) != (value.offsets is None):
        return None
    blocks = value.codes.unflatten(-1, (-1, 32))
    scales = value.scales.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    if value.offsets is None:
        return torch.cat([scales, blocks ^ 128], -1).flatten(-2).numpy(), "Q8_0"  # code - 128 in two's complement
    offsets = value.offsets.contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
    pairs = torch.stack([blocks[..., :16], blocks[..., 16:]], -1).flatten(-2)  # 0 and 16, 1 and 17 … share a byte
    return torch.cat([scales, offsets, pack_nibbles(pairs)], -1).flatten(-2).numpy(), "Q4_1"


def _header(writer: Any, decoder: Decoder, shape: Shape, architecture: Architecture, tokenizer: GgufFile | None) -> None:
    import gguf

    routing = shape.routing
    writer.add_name(str(decoder.graph.info.get("name", "model")))
    writer.add_block_count(len(decoder.layers))
    writer.add_context_length(int(decoder.graph.info.get("context_length") or 2048))
    writer.add_embedding_length(decoder.d_model)
    writer.add_feed_forward_length(routing.width if routing else shape.dense_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.rotated)
    writer.add_rope_freq_base(float(decoder.rope.theta or 0))
    writer.add_layer_norm_rms_eps(decoder.epsilon)
    writer.add_vocab_size(decoder.vocabulary)
    if routing is not None:
        writer.add_expert_count(routing.experts)
        writer.add_expert_used_count(routing.k)
        if routing.shared:
            writer.add_expert_shared_feed_forward_length(routing.shared)
    if architecture.name == "granite-moe":
        writer.add_attention_scale(shape.scale)
        for add in (writer.add_embedding_scale, writer.add_residual_scale, writer.add_logit_scale):
            add(1.0)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    for key, entry in tokenizer.metadata.items():
        if key.startswith("tokenizer."):
            kinds = [gguf.GGUFValueType(kind) for kind in entry.types]
            writer.add_key_value(key, entry.value, kinds[0], kinds[1] if len(kinds) > 1 else None)


def _parts(found: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, with gates and ups that are one tensor in checkpoints taken apart."""
    for name, value in found.items():
        base = name.removesuffix(".weight")
        if base.endswith(_JOINED):
            for part, half in zip(("gate", "up"), value.chunk(2, dim=-2), strict=True):
                yield f"{base}.{part}.weight", half.contiguous()
        else:
            yield name, value


_JOINED = ("experts.gate_up_proj", "shared_mlp.input_linear")
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"}, **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    "block_sparse_moe.router": "ffn_gate_inp", "block_sparse_moe.experts.down_proj": "ffn_down_exps",
    **{f"block_sparse_moe.experts.gate_up_proj.{n}": f"ffn_{n}_exps" for n in ("gate", "up")},
    **{f"shared_mlp.input_linear.{n}": f"ffn_{n}_shexp" for n in ("gate", "up")}, "shared_mlp.output_linear": "ffn_down_shexp",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """GGUF's name of a checkpoint's tensor."""
    base, leaf = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "weight")
    if base in _TOP:
        return f"{_TOP[base]}.{leaf}"
    _, _, layer, part = base.split(".", 3)
    return f"blk.{layer}.{_LAYER[part]}.{leaf}"


def _interleaved(heads: int, head_dim: int) -> Tensor:
    """Rows in the order in which the two halves of each head alternate."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten()


def _rows(value: Quantized, order: Tensor) -> Quantized:
    return Quantized(value.codes[order], value.scales[order], None if value.offsets is None else value.offsets[order], value.bits)


def _codes(decoder: Decoder) -> dict[str, Quantized]:
    """The quantized weights of a decoder without experts, by the names of :func:`~dyncomp.backends.hf.tensors.tensors`."""
    graph, found = decoder.graph, {}
    sources = {"model.embed_tokens.weight": decoder.embedding, "lm_head.weight": decoder.head.weight}
    for i, layer in enumerate(decoder.layers):
        attention = {"q": layer.query, "k": layer.key, "v": layer.value, "o": layer.out}
        sources |= {f"model.layers.{i}.self_attn.{n}_proj.weight": linear.weight for n, linear in attention.items()}
        ups = getattr(layer.ffn, "ups", ())
        if len(ups) == 2:
            linears = zip(("gate", "up", "down"), (*ups, layer.ffn.down), strict=True)  # type: ignore[union-attr]
            sources |= {f"model.layers.{i}.mlp.{n}_proj.weight": linear.weight for n, linear in linears}
    for name, source in sources.items():
        if source in graph.quantized:
            found[name] = graph.quantized[source]
    return found
