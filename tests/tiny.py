"""Tiny random models of real architectures: what every pass and backend is tried on for breadth.

:data:`ARCHITECTURES` is data: how to build each model, what to feed it, and the regions it must be found to have.
The weights are random but lively (every layer changes its input by about as much as its input), so that a wrong
rewrite shows in the output.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_handwritten import ConvNet, NanoGPT, TorchEncoder
from torch import Tensor, nn

from dyncomp.graph import Graph
from dyncomp.trace import trace

VOCAB, HIDDEN, FFN, LAYERS, HEADS = 96, 32, 64, 2, 4
Inputs = dict[str, Tensor]
Dims = dict[str, dict[int, str]]


class Model(nn.Module):
    """A Hugging Face model with tensors in and one tensor out, the attribute ``output`` of what it returns."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output


class TokenModel(Model):
    def forward(self, input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids), self.output)


class MaskedModel(Model):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids, attention_mask=attention_mask), self.output)


class PixelModel(Model):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return getattr(self.model(pixel_values=pixel_values), self.output)


class SoundModel(Model):
    def forward(self, input_features: Tensor) -> Tensor:
        return getattr(self.model(input_features=input_features), self.output)


@dataclass(frozen=True)
class Tiny:
    """One architecture, and what must be found in its graph.

    Attributes:
        build: () -> (module, example inputs, dynamic dimensions) as :func:`dyncomp.trace.trace` takes them.
        ffns, attentions: expected counts.
        activation, gated, layout: of every FFN (``""`` where there is none).
        bias: whether the FFNs have biases.
        shared: whether layers share their FFN weights.
        blocks: expected residual blocks by kind.
        vocab: the model ends in a vocabulary head; ``tied``: with the embedding's weight.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs, Dims]]
    ffns: int = LAYERS
    activation: str = "gelu"
    gated: bool = False
    layout: str = "plain"
    bias: bool = True
    attentions: int = LAYERS
    shared: bool = False
    blocks: Mapping[str, int] = field(default_factory=lambda: {"attention": LAYERS, "ffn": LAYERS})
    vocab: bool = False
    tied: bool = False


def enliven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of unit gain, small random biases, norms near one; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise / math.sqrt(max(p[0].numel(), 1)))
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            else:
                p.add_(0.1 * noise)
    return module.eval()


# ---- inputs --------------------------------------------------------------------------------------------------------
def tokens(batch: int, length: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """[batch, length] int64 token ids; never 0, which some models take for padding."""
    return torch.randint(2, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def sample(inputs: Inputs, dims: Dims, sizes: Mapping[str, int], seed: int = 1) -> Inputs:
    """Fresh inputs like ``inputs`` with the dynamic dimensions at ``sizes``."""
    generator = torch.Generator().manual_seed(seed)
    fresh = {}
    for name, value in inputs.items():
        shape = [sizes.get(dims.get(name, {}).get(i, ""), size) for i, size in enumerate(value.shape)]
        if name.endswith("mask"):
            fresh[name] = torch.ones(shape, dtype=value.dtype)
            fresh[name][0, -1] = 0
        elif value.is_floating_point():
            fresh[name] = torch.randn(shape, generator=generator)
        else:
            fresh[name] = torch.randint(2, VOCAB, shape, generator=generator)
    return fresh


TOKENS: Dims = {"input_ids": {0: "batch", 1: "sequence"}}
MASKED: Dims = TOKENS | {"attention_mask": {0: "batch", 1: "sequence"}}
PIXELS: Dims = {"pixel_values": {0: "batch"}}


def _ids() -> Inputs:
    return {"input_ids": tokens(2, 7)}


def _ids_and_mask() -> Inputs:
    return _ids() | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def _transformers(
    wrapper: type[Model], model: str, config: str, options: dict[str, Any], *, example: Inputs, dims: Dims, output: str = "last_hidden_state"
) -> Callable[[], tuple[nn.Module, Inputs, Dims]]:
    def build() -> tuple[nn.Module, Inputs, Dims]:
        import transformers

        module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return wrapper(enliven(module), output), example, dims

    return build


def _decoder(name: str, family: str, /, *, model: str = "", config: str = "", expect: dict[str, Any] | None = None, **options: Any) -> Tiny:
    sizes = dict(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model, config = model or f"{family}ForCausalLM", config or f"{family}Config"
    build = _transformers(TokenModel, model, config, sizes | options, example=_ids(), dims=TOKENS, output="logits")
    return Tiny(name, build, vocab=True, **(expect or {}))


def _encoder(name: str, model: str, config: str, /, *, expect: dict[str, Any] | None = None, **options: Any) -> Tiny:
    sizes = dict(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
                 max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)  # fmt: skip
    build = _transformers(MaskedModel, model, config, sizes | options, example=_ids_and_mask(), dims=MASKED)
    return Tiny(name, build, **(expect or {}))


def _vision(name: str, model: str, config: str, /, *, expect: dict[str, Any] | None = None, **options: Any) -> Tiny:
    sizes = dict(hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=16, patch_size=8)
    build = _transformers(PixelModel, model, config, sizes | options, example=_pixels(), dims=PIXELS)
    return Tiny(name, build, **(expect or {}))


def _whisper() -> tuple[nn.Module, Inputs, Dims]:
    import transformers

    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=HIDDEN, encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        encoder_ffn_dim=FFN, decoder_ffn_dim=FFN, num_mel_bins=8, max_source_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        decoder_start_token_id=1, begin_suppress_tokens=None,
    )  # fmt: skip
    encoder = enliven(transformers.WhisperModel(config).encoder)
    features = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
    return SoundModel(encoder, "last_hidden_state"), features, {"input_features": {0: "batch"}}


def _nanogpt() -> tuple[nn.Module, Inputs, Dims]:
    return enliven(NanoGPT(VOCAB, HIDDEN, FFN, LAYERS, HEADS, 64)), _ids(), TOKENS


def _torch_encoder() -> tuple[nn.Module, Inputs, Dims]:
    example = {"x": torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))}
    return enliven(TorchEncoder(HIDDEN, FFN, LAYERS, HEADS)), example, {"x": {0: "batch", 1: "sequence"}}


def _convnet() -> tuple[nn.Module, Inputs, Dims]:
    return enliven(ConvNet()), _pixels(), PIXELS


SILU = dict(activation="silu", gated=True, layout="separate", bias=False)
GEGLU = SILU | dict(activation="gelu_tanh")
PARALLEL = dict(blocks={"parallel": LAYERS})
T5 = dict(d_model=HIDDEN, d_kv=8, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS, use_cache=False, decoder_start_token_id=0)

ARCHITECTURES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        # decoders
        _decoder("llama", "Llama", expect=SILU),
        _decoder("qwen2", "Qwen2", expect=SILU | dict(tied=True), tie_word_embeddings=True),
        _decoder("qwen3", "Qwen3", expect=SILU, head_dim=8),
        _decoder("mistral", "Mistral", expect=SILU, sliding_window=4),
        _decoder("olmo2", "Olmo2", expect=SILU),
        _decoder("stablelm", "StableLm", expect=SILU),
        _decoder("gemma2", "Gemma2", expect=GEGLU | dict(tied=True), head_dim=8, sliding_window=4),
        _decoder("gemma3", "Gemma3", config="Gemma3TextConfig", expect=GEGLU | dict(tied=True), head_dim=8, sliding_window=4),
        _decoder("phi3", "Phi3", expect=SILU | dict(layout="gate|up")),
        _decoder("phi", "Phi", expect=PARALLEL | dict(activation="gelu_tanh"), num_key_value_heads=HEADS),
        _decoder("falcon", "Falcon", expect=PARALLEL | dict(bias=False, tied=True), ffn_hidden_size=FFN, new_decoder_architecture=False),
        _decoder("gptj", "GPTJ", expect=PARALLEL | dict(activation="gelu_tanh"), n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN,
                 n_positions=64, rotary_dim=4),
        _decoder("gpt_neox", "GPTNeoX", expect=PARALLEL),
        _decoder("gpt2", "GPT2", model="GPT2LMHeadModel", expect=dict(activation="gelu_tanh", tied=True), n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN,
                 n_positions=64),
        _decoder("opt", "OPT", expect=dict(activation="relu", tied=True), ffn_dim=FFN, word_embed_proj_dim=HIDDEN),
        _decoder("bloom", "Bloom", expect=dict(activation="gelu_tanh", tied=True), n_layer=LAYERS, n_head=HEADS),
        _decoder("nemotron", "Nemotron", expect=dict(activation="relu2", bias=False)),
        _decoder("mixtral", "Mixtral", expect=dict(ffns=0, blocks={"attention": LAYERS}), num_local_experts=4, num_experts_per_tok=2),
        _decoder("mamba", "Mamba", expect=dict(ffns=0, attentions=0, blocks={}, tied=True), state_size=4),
        # encoders
        _encoder("bert", "BertModel", "BertConfig"),
        _encoder("roberta", "RobertaModel", "RobertaConfig"),
        _encoder("distilbert", "DistilBertModel", "DistilBertConfig", dim=HIDDEN, hidden_dim=FFN, n_layers=LAYERS, n_heads=HEADS),
        _encoder("modernbert", "ModernBertModel", "ModernBertConfig", expect=dict(gated=True, layout="gate|up", bias=False), local_attention=4),
        _encoder("albert", "AlbertModel", "AlbertConfig", expect=dict(activation="gelu_tanh", shared=True), embedding_size=16),
        _encoder("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", embedding_size=HIDDEN, q_groups=1, k_groups=1, v_groups=1,
                 post_attention_groups=1, intermediate_groups=1, output_groups=1),
        _encoder("clip_text", "CLIPTextModel", "CLIPTextConfig", expect=dict(activation="quick_gelu")),
        _encoder("t5", "T5EncoderModel", "T5Config", expect=dict(activation="relu", bias=False), feed_forward_proj="relu", **T5),
        _encoder("t5_gated", "T5EncoderModel", "T5Config", expect=GEGLU, feed_forward_proj="gated-gelu", **T5),
        # vision and audio
        _vision("vit", "ViTModel", "ViTConfig"),
        _vision("dinov2", "Dinov2Model", "Dinov2Config", mlp_ratio=2),
        _vision("dinov2_swiglu", "Dinov2Model", "Dinov2Config", expect=SILU | dict(layout="gate|up", bias=True), mlp_ratio=2, use_swiglu_ffn=True),
        _vision("clip_vision", "CLIPVisionModel", "CLIPVisionConfig", expect=dict(activation="quick_gelu")),
        Tiny("whisper_encoder", _whisper),
        # plain PyTorch
        Tiny("nanogpt", _nanogpt, activation="gelu_tanh", vocab=True, tied=True),
        Tiny("torch_encoder", _torch_encoder, activation="relu"),
        Tiny("convnet", _convnet, ffns=0, attentions=0, blocks={}),
    )
}  # fmt: skip


@functools.cache
def built(name: str) -> tuple[nn.Module, Inputs, Dims]:
    """The model of this name, its example inputs and dynamic dimensions; made once per session."""
    return ARCHITECTURES[name].build()


@functools.cache
def _traced(name: str) -> Graph:
    module, inputs, dims = built(name)
    return trace(module, inputs, dims, info={"name": name})


def trace_tiny(name: str) -> Graph:
    """The graph of this name; traced once per session, a fresh copy each time."""
    return _traced(name).copy()
