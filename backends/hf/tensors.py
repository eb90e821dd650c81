"""A decoder as the configuration and the tensors of a stock architecture."""

from __future__ import annotations

from typing import Any

import torch
from dyncomp.backends.hf.architectures import ACTIVATIONS, Architecture
from dyncomp.backends.hf.shape import Shape
from torch import Tensor

from dyncomp.errors import BackendError
from dyncomp.regions.decoder import Decoder, DecoderLayer
from dyncomp.regions.ffn import FFN
from dyncomp.regions.linear import Linear
from dyncomp.regions.router import TopK

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def configuration(architecture: Architecture, decoder: Decoder, shape: Shape, source: dict[str, Any], dtype: torch.dtype) -> Any:
    """The configuration object of transformers.

    Args:
        source: the dense model's configuration, for what a graph does not hold: special tokens, the context, scaled rotary embeddings.

    Raises:
        BackendError: the rotary frequencies are none that a configuration describes.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values: dict[str, Any] = {
        "vocab_size": decoder.vocabulary, "hidden_size": decoder.d_model, "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "hidden_act": ACTIVATIONS[shape.activation], "rms_norm_eps": decoder.epsilon, "tie_word_embeddings": decoder.tied,
        "max_position_embeddings": int(decoder.graph.info.get("context_length") or source.get("max_position_embeddings") or 2048),
        "rope_parameters": _rope(decoder, source), "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip
    values |= {key: source.get(key) for key in _TOKENS} | architecture.extra(shape)
    return CONFIG_MAPPING[architecture.model_type](**values)


def _rope(decoder: Decoder, source: dict[str, Any]) -> dict[str, Any]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = decoder.rope
    if rope.theta is not None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    parameters = source.get("rope_parameters") or {}
    if parameters.get("rope_type") in ("linear", "llama3", "yarn"):
        config = LlamaConfig(
            hidden_size=decoder.d_model, num_attention_heads=1, head_dim=rope.rotated, rope_parameters=parameters,
            max_position_embeddings=source.get("max_position_embeddings", 2048),
        )  # fmt: skip
        frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, torch.device("cpu"))
        if factor == 1 and torch.allclose(frequencies.double(), rope.frequencies, rtol=1e-4):
            return dict(parameters)
    raise BackendError(
        "hf: the rotary embedding's frequencies are neither powers of one base nor those of the source's configuration",
        hint="only default, linear, llama3 and yarn embeddings can be written down",
    )


def tensors(architecture: Architecture, decoder: Decoder, shape: Shape, temper: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the architecture, by the name its class has for it.

    Args:
        temper: p of the tempered routers, where the experts that run have equal gates; other routers have their own temper.
    """
    graph = decoder.graph
    found = {"model.embed_tokens.weight": graph.tensor(decoder.embedding).detach(), "model.norm.weight": decoder.norm}
    found["lm_head.weight"] = found["model.embed_tokens.weight"] if decoder.tied else decoder.head.weight_matrix(graph)
    for index, layer in enumerate(decoder.layers):
        parts = _attention(architecture, decoder, layer, shape)
        if isinstance(layer.ffn, FFN):
            parts |= _dense(architecture, decoder, layer, shape)
        else:
            parts |= _routed(architecture, decoder, layer, shape, temper)
        found |= {f"model.layers.{index}.{name}": value for name, value in parts.items()}
    exact = architecture.router_bias or ""  # stays in float32: see Glm4Moe's class
    return {name: value.to(torch.float32 if exact and name.endswith(exact) else dtype).contiguous() for name, value in found.items()}


def _attention(architecture: Architecture, decoder: Decoder, layer: DecoderLayer, shape: Shape) -> dict[str, Tensor]:
    parts = {"input_layernorm.weight": layer.attention_norm, "post_attention_layernorm.weight": layer.ffn_norm}
    for name, scale in (("q", layer.query_norm), ("k", layer.key_norm)):
        if scale is not None:
            parts[f"self_attn.{name}_norm.weight"] = scale
    biased = shape.qkv_bias or shape.out_bias or architecture.qkv_bias == "always"
    for name, linear in (("q", layer.query), ("k", layer.key), ("v", layer.value), ("o", layer.out)):
        parts[f"self_attn.{name}_proj.weight"] = linear.weight_matrix(decoder.graph)
        if biased and (name != "o" or architecture.out_bias == "may"):
            parts[f"self_attn.{name}_proj.bias"] = _bias(decoder, linear)
    return parts


def _bias(decoder: Decoder, linear: Linear) -> Tensor:
    bias = linear.bias_vector(decoder.graph)
    return torch.zeros(linear.out_features) if bias is None else bias


def _dense(architecture: Architecture, decoder: Decoder, layer: DecoderLayer, shape: Shape) -> dict[str, Tensor]:
    weights = decoder.dense(layer)
    gate, up = weights.w_up.chunk(2)
    parts = {"mlp.gate_proj.weight": gate, "mlp.up_proj.weight": up, "mlp.down_proj.weight": weights.w_down}
    if shape.ffn_bias:
        b_up = torch.zeros(len(weights.w_up)) if weights.b_up is None else weights.b_up
        b_down = torch.zeros(len(weights.w_down)) if weights.b_down is None else weights.b_down
        parts |= dict(zip((f"mlp.{p}_proj.bias" for p in ("gate", "up", "down")), (*b_up.chunk(2), b_down), strict=True))
    return parts


def _routed(architecture: Architecture, decoder: Decoder, layer: DecoderLayer, shape: Shape, temper: int) -> dict[str, Tensor]:
    weights = decoder.routed(layer)
    router = weights.router
    assert isinstance(router, TopK)
    weighting = router.weighting
    slope = 2.0**-temper if weighting.equal else weighting.slope
    first, width = router.shared, weights.w_down.shape[2]
    parts = {
        architecture.router: router.weight * slope,
        f"{architecture.experts}.gate_up_proj": weights.w_up[first:],
        f"{architecture.experts}.down_proj": weights.w_down[first:] * architecture.gain(shape),
    }
    if architecture.router_bias is not None:
        bias = torch.zeros(len(router.weight)) if router.bias is None else router.bias
        parts[architecture.router_bias] = bias * slope / 4 if weighting.equal else bias  # of sigmoid(z) the slope at 0 is 1/4
    if architecture.shared:
        ups, downs = weights.w_up[:first], weights.w_down[:first]
        if architecture.always_shared and not first:
            ups, downs = torch.zeros_like(weights.w_up[:1]), torch.zeros_like(weights.w_down[:1])
        both = ups.unflatten(1, (2, width)).transpose(0, 1).flatten(1, 2)  # [2, shared * width, d]
        down = downs.transpose(0, 1).flatten(1) * architecture.shared_factor  # [d, shared * width]
        joined = (both.flatten(0, 1),) if len(architecture.shared) == 2 else (both[0], both[1])
        if first or architecture.model_type != "granitemoeshared":
            parts |= dict(zip(architecture.shared, (*joined, down), strict=True))
    if architecture.model_type == "qwen2_moe":  # sigmoid(0) = 1/2, exactly; shared_factor makes up for it
        parts["mlp.shared_expert_gate.weight"] = torch.zeros(1, weights.w_up.shape[2])
    return parts
