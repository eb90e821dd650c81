"""Tiny random models of real architectures: what the tests try every pass and backend on, and what docs/models.md is measured on.

:data:`ARCHITECTURES` is data: how to build each model, what to feed it, and the regions it must be found to have.
The weights are random but lively (every layer changes its input by about as much as its input), so that a wrong
rewrite shows in the output.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bench.tiny_handwritten import ConvNet, NanoGPT, TimmViT, TorchEncoder
from dyncomp.graph import Graph
from dyncomp.trace import trace

VOCAB, HIDDEN, FFN, LAYERS, HEADS = 96, 32, 64, 2, 4
Inputs = dict[str, Tensor]
Dims = dict[str, dict[int, str]]
Kw = dict[str, Any]


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


class Seq2SeqModel(Model):
    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_ids=input_ids, decoder_input_ids=decoder_input_ids), self.output)


class SpeechModel(Model):
    def forward(self, input_features: Tensor, decoder_input_ids: Tensor) -> Tensor:
        return getattr(self.model(input_features=input_features, decoder_input_ids=decoder_input_ids), self.output)


@dataclass(frozen=True)
class Tiny:
    """One architecture, and what must be found in its graph.

    Attributes:
        build: () -> (module, example inputs, dynamic dimensions) as :func:`dyncomp.trace.trace` takes them.
        ffns, attentions: expected counts.
        activation, gated, layout, d_ff: of every FFN (``""`` where there is none).
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
    d_ff: int = FFN
    bias: bool = True
    attentions: int = LAYERS
    shared: bool = False
    blocks: Mapping[str, int] = field(default_factory=lambda: {"attention": LAYERS, "ffn": LAYERS})
    vocab: bool = False
    tied: bool = False


def enliven(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights of unit gain, small random biases, norms near one; in place."""
    generator = torch.Generator().manual_seed(seed)
    kernels = {id(m.weight) for m in module.modules() if isinstance(m, nn.Conv1d)}
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 3 and len(p) > 1 and id(p) not in kernels:  # a matrix for each expert
                p.copy_(noise / math.sqrt(p.shape[-1]))
            elif p.ndim >= 2:
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
TARGET: Dims = {"decoder_input_ids": {0: "batch", 1: "target"}}


def _ids() -> Inputs:
    return {"input_ids": tokens(2, 7)}


def _ids_and_mask() -> Inputs:
    return _ids() | {"attention_mask": torch.ones(2, 7, dtype=torch.int64)}


def _target() -> Inputs:
    return {"decoder_input_ids": tokens(2, 5, seed=1)}


def _pixels() -> Inputs:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


# What transformers calls the same sizes, by family.
_COMMON: Kw = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_TEXT: Kw = _COMMON | {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_DECODER: Kw = _TEXT | {"num_key_value_heads": 2, "use_cache": False}
_GPT: Kw = {"n_embd": HIDDEN, "n_inner": FFN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64}
_DISTIL: Kw = {"dim": HIDDEN, "hidden_dim": FFN, "n_layers": LAYERS, "n_heads": HEADS}
_T5: Kw = {
    "d_model": HIDDEN,
    "d_kv": 8,
    "d_ff": FFN,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
_BART: Kw = {"d_model": HIDDEN, "use_cache": False, "decoder_start_token_id": 1} | {
    f"{part}_{key}": value for part in ("encoder", "decoder")
    for key, value in {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FFN}.items()
}  # fmt: skip
_UNGROUPED: Kw = dict.fromkeys(("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups", "output_groups"), 1)


def _transformers(
    wrapper: type[Model], model: str, config: str, options: dict[str, Any], example: Inputs, dims: Dims, output: str
) -> Callable[[], tuple[nn.Module, Inputs, Dims]]:
    def build() -> tuple[nn.Module, Inputs, Dims]:
        import transformers

        module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return wrapper(enliven(module), output), example, dims

    return build


def _decoder(
    name: str, family: str, expect: dict[str, Any], *, model: str = "", config: str = "", dims: Dims = TOKENS, **options: Any
) -> Tiny:
    model, config = model or f"{family}ForCausalLM", config or f"{family}Config"
    return Tiny(name, _transformers(TokenModel, model, config, _DECODER | options, _ids(), dims, "logits"), vocab=True, **expect)


def _encoder(name: str, model: str, config: str, expect: dict[str, Any], **options: Any) -> Tiny:
    return Tiny(name, _transformers(MaskedModel, model, config, _TEXT | options, _ids_and_mask(), MASKED, "last_hidden_state"), **expect)


def _vision(name: str, family: str, expect: dict[str, Any], **options: Any) -> Tiny:
    options = _COMMON | {"image_size": 16, "patch_size": 8} | options
    build = _transformers(PixelModel, f"{family}Model", f"{family}Config", options, _pixels(), PIXELS, "last_hidden_state")
    return Tiny(name, build, **expect)


def _whisper() -> tuple[Any, Inputs]:
    import transformers

    sizes: Kw = {f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in
             {"layers": LAYERS, "attention_heads": HEADS, "ffn_dim": FFN}.items()}  # fmt: skip
    config = transformers.WhisperConfig(
        vocab_size=VOCAB, d_model=HIDDEN, num_mel_bins=8, max_source_positions=16, max_target_positions=64, use_cache=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, begin_suppress_tokens=None, **sizes,
    )  # fmt: skip
    features = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))}
    return enliven(transformers.WhisperForConditionalGeneration(config)), features


def _whisper_encoder() -> tuple[nn.Module, Inputs, Dims]:
    model, features = _whisper()
    return SoundModel(model.model.encoder, "last_hidden_state"), features, {"input_features": {0: "batch"}}


def _whisper_whole() -> tuple[nn.Module, Inputs, Dims]:
    model, features = _whisper()
    return SpeechModel(model, "logits"), features | _target(), {"input_features": {0: "batch"}} | TARGET


def _seq2seq(name: str, model: str, config: str, expect: dict[str, Any], **options: Any) -> Tiny:
    inputs, dims = _ids() | _target(), TOKENS | TARGET
    return Tiny(name, _transformers(Seq2SeqModel, model, config, _TEXT | options, inputs, dims, "logits"), vocab=True, **BOTH | expect)


def _nanogpt() -> tuple[nn.Module, Inputs, Dims]:
    return enliven(NanoGPT(VOCAB, HIDDEN, FFN, LAYERS, HEADS, 64)), _ids(), TOKENS


def _torch_encoder() -> tuple[nn.Module, Inputs, Dims]:
    example = {"x": torch.randn(2, 7, HIDDEN, generator=torch.Generator().manual_seed(0))}
    return enliven(TorchEncoder(HIDDEN, FFN, LAYERS, HEADS)), example, {"x": {0: "batch", 1: "sequence"}}


def _timm_vit() -> tuple[nn.Module, Inputs, Dims]:
    return enliven(TimmViT(HIDDEN, FFN, LAYERS, HEADS, image=16, patch=8, classes=10)), _pixels(), PIXELS


def _convnet() -> tuple[nn.Module, Inputs, Dims]:
    return enliven(ConvNet()), _pixels(), PIXELS


# ---- the table -----------------------------------------------------------------------------------------------------
GELU: Kw = {"activation": "gelu"}
GELU_TANH: Kw = {"activation": "gelu_tanh"}
RELU: Kw = {"activation": "relu"}
QUICK: Kw = {"activation": "quick_gelu"}
SILU: Kw = {"activation": "silu", "gated": True, "layout": "separate", "bias": False}
GEGLU: Kw = SILU | GELU_TANH
PARALLEL: Kw = {"blocks": {"parallel": LAYERS}}
NO_BIAS: Kw = {"bias": False}
TIED: Kw = {"tied": True}
BOTH: Kw = {"ffns": 2 * LAYERS, "attentions": 3 * LAYERS, "blocks": {"attention": 3 * LAYERS, "ffn": 2 * LAYERS}}  # encoder and decoder

ARCHITECTURES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        # decoders
        _decoder("llama", "Llama", SILU),
        _decoder("qwen2", "Qwen2", SILU | TIED, tie_word_embeddings=True),
        _decoder("qwen3", "Qwen3", SILU, head_dim=8),
        _decoder("mistral", "Mistral", SILU, sliding_window=4),
        _decoder("olmo2", "Olmo2", SILU),
        _decoder("stablelm", "StableLm", SILU),
        _decoder("gemma2", "Gemma2", GEGLU | TIED, head_dim=8, sliding_window=4),
        _decoder("gemma3", "Gemma3", GEGLU | TIED, config="Gemma3TextConfig", head_dim=8, sliding_window=4),
        _decoder("phi3", "Phi3", SILU | {"layout": "gate|up"}),
        _decoder("phi", "Phi", GELU_TANH | PARALLEL, num_key_value_heads=HEADS),
        _decoder("falcon", "Falcon", GELU | PARALLEL | NO_BIAS | TIED, ffn_hidden_size=FFN, new_decoder_architecture=False),
        _decoder("gptj", "GPTJ", GELU_TANH | PARALLEL, rotary_dim=4, **_GPT),
        _decoder("gpt_neox", "GPTNeoX", GELU | PARALLEL),
        _decoder("gpt2", "GPT2", GELU_TANH | TIED, model="GPT2LMHeadModel", **_GPT),
        _decoder("opt", "OPT", RELU | TIED, ffn_dim=FFN, word_embed_proj_dim=HIDDEN),
        _decoder("bloom", "Bloom", GELU_TANH | TIED | {"d_ff": 4 * HIDDEN}, n_layer=LAYERS, n_head=HEADS),
        _decoder("nemotron", "Nemotron", {"activation": "relu2"} | NO_BIAS),
        _decoder("mixtral", "Mixtral", {"ffns": 0}, num_local_experts=4, num_experts_per_tok=2),
        # mixtures become routed FFNs; the expert that every token runs is an FFN like any other
        _decoder("qwen2_moe", "Qwen2Moe", SILU, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                 shared_expert_intermediate_size=FFN),
        # its scan is a Python loop: the sequence cannot be dynamic
        _decoder("mamba", "Mamba", {"ffns": 0, "attentions": 0, "blocks": {}} | TIED, dims={"input_ids": {0: "batch"}}, state_size=4),
        # encoders
        _encoder("bert", "BertModel", "BertConfig", GELU),
        _encoder("roberta", "RobertaModel", "RobertaConfig", GELU),
        _encoder("distilbert", "DistilBertModel", "DistilBertConfig", GELU, **_DISTIL),
        _encoder("modernbert", "ModernBertModel", "ModernBertConfig", SILU | GELU | {"layout": "gate|up"}, local_attention=4,
                 cls_token_id=1, sep_token_id=2),
        _encoder("albert", "AlbertModel", "AlbertConfig", GELU_TANH | {"shared": True}, embedding_size=16),
        _encoder("squeezebert", "SqueezeBertModel", "SqueezeBertConfig", GELU, embedding_size=HIDDEN, **_UNGROUPED),
        _encoder("clip_text", "CLIPTextModel", "CLIPTextConfig", QUICK),
        _encoder("t5", "T5EncoderModel", "T5Config", RELU | NO_BIAS, feed_forward_proj="relu", **_T5),
        _encoder("t5_gated", "T5EncoderModel", "T5Config", GEGLU, feed_forward_proj="gated-gelu", **_T5),
        # encoder and decoder
        _seq2seq("t5_whole", "T5ForConditionalGeneration", "T5Config", RELU | NO_BIAS | TIED, feed_forward_proj="relu", **_T5),
        _seq2seq("bart", "BartForConditionalGeneration", "BartConfig", GELU | TIED, **_BART),
        Tiny("whisper_whole", _whisper_whole, vocab=True, tied=True, **BOTH),
        # vision and audio
        _vision("vit", "ViT", GELU),
        _vision("dinov2", "Dinov2", GELU, mlp_ratio=2),
        _vision("dinov2_swiglu", "Dinov2", SILU | {"bias": True, "d_ff": 48}, mlp_ratio=2, use_swiglu_ffn=True),  # 64 * 2 / 3, rounded up
        _vision("clip_vision", "CLIPVision", QUICK),
        Tiny("whisper_encoder", _whisper_encoder),
        # plain PyTorch
        Tiny("nanogpt", _nanogpt, activation="gelu_tanh", vocab=True, tied=True),
        Tiny("timm_vit", _timm_vit),
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
