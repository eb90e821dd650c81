"""From a Hugging Face model to a module with named tensor inputs and one tensor output."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncomp.errors import ModelError
from dyncomp.models.loaded import EXAMPLE_BATCH, EXAMPLE_SEQUENCE, Decoding, LoadedModel, check_forward, finish, plain_config

TOKENS = {0: "batch", 1: "sequence"}
TARGET = {0: "batch", 1: "target"}
WRITTEN = 512
"""Tokens that an encoder–decoder may write where nothing in it sets a limit (T5's positions are distances)."""
_BY_FACTORY = "write a factory (module:function) that returns the module with its example inputs"


class CausalLM(nn.Module):
    """``input_ids: [batch, sequence]`` -> ``logits: [batch, sequence, vocabulary]``; no cache, no padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._options = _options(model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, **self._options).logits


class Encoder(nn.Module):
    """``input_ids, attention_mask: [batch, sequence]`` -> ``last_hidden_state: [batch, sequence, width]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._options = _options(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options).last_hidden_state


class EncoderDecoder(nn.Module):
    """What is read and ``decoder_input_ids: [batch, target]`` -> ``logits: [batch, target, vocabulary]``, or without a vocabulary head
    ``last_hidden_state: [batch, target, width]``.

    Args:
        output: which of the two. What is read is ``input_ids: [batch, source]`` or ``input_features: [batch, mel bins, frames]``.
    """

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self._options = _options(model)

    def forward(
        self, input_ids: Tensor | None = None, input_features: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        read = {"input_ids": input_ids} if input_features is None else {"input_features": input_features}
        return getattr(self.model(**read, decoder_input_ids=decoder_input_ids, **self._options), self.output)


class Vision(nn.Module):
    """``pixel_values: [batch, channels, height, width]`` -> ``last_hidden_state: [batch, patches, width]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._options = _options(model)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values, **self._options).last_hidden_state


def is_causal_lm(config: Any) -> bool:
    """Whether a configuration describes a decoder with a vocabulary head.

    The checkpoint's own class name decides where there is one. Where there is none, membership in transformers' table of
    causal models does, except for families that are also masked language models (BERT is in both tables).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if getattr(config, "is_encoder_decoder", False) or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        return False
    names = config.architectures or []
    return not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model with the vocabulary head its checkpoint has, if it has one."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    )

    if is_causal_lm(config):
        return AutoModelForCausalLM
    kinds = [(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, AutoModelForSeq2SeqLM),
             (MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, AutoModelForSpeechSeq2Seq)]  # fmt: skip
    names = config.architectures or []
    return next((auto for known, auto in kinds if known.get(config.model_type) in names), AutoModel)


def wrap(
    model: nn.Module, *, name: str, kind: str, tokenizer: Any | None, causal: bool, processor: Any | None = None,
    decoding: Decoding | None = None, check: bool = True,
) -> LoadedModel:  # fmt: skip
    """Describe a Hugging Face model by its inputs and its one output.

    Args:
        model: a ``PreTrainedModel``; with a vocabulary head when ``causal``. May be on the meta device.
        processor: of images, their size is what it makes, else what the configuration says; or of sound.
        decoding: of an encoder–decoder; by default what its configuration says.
        check: run the forward pass once where the class alone does not say that it works.

    Raises:
        ModelError: the model takes something other than tokens, images, or sound that is written down.
    """
    config: Any = model.config
    if not config.architectures:  # a GGUF file does not name it; a bundle's reader needs it
        config.architectures = [type(model).__name__]
    facts = plain_config(config)
    device = next(model.parameters()).device
    main_input = getattr(model, "main_input_name", "input_ids")
    dynamic: dict[str, dict[int, str]]
    module: nn.Module
    if causal:
        module, task, output = CausalLM(model), "causal-lm", "logits"
        inputs = {"input_ids": _tokens(config, device)}
        dynamic = {"input_ids": dict(TOKENS)}
    elif main_input == "pixel_values":
        _drop_pooler(model)
        module, task, output = Vision(model), "image-encoder", "last_hidden_state"
        inputs = {"pixel_values": _images(config, next(model.parameters()), name, processor)}
        dynamic = {"pixel_values": {0: "batch"}}
    elif main_input == "input_features" and getattr(config, "is_encoder_decoder", False) and _has_head(model):
        _compute_everything(model)
        module, task, output = EncoderDecoder(model, "logits"), "seq2seq", "logits"
        inputs = {
            "input_features": _features(config, next(model.parameters()), name, processor),
            "decoder_input_ids": _tokens(config, device)[:, :-4],
        }
        dynamic = {"input_features": {0: "batch"}, "decoder_input_ids": dict(TARGET)}
    elif main_input != "input_ids":
        raise ModelError(
            f"{name}: a {config.model_type!r} model takes {main_input!r}; dyncomp loads models of tokens or images",
            hint=_BY_FACTORY,
        )
    elif getattr(config, "is_encoder_decoder", False):
        _compute_everything(model)
        task, output = ("seq2seq", "logits") if _has_head(model) else ("other", "last_hidden_state")
        module = EncoderDecoder(model, output)
        inputs = {"input_ids": _tokens(config, device), "decoder_input_ids": _tokens(config, device)[:, :-4]}
        dynamic = {"input_ids": {0: "batch", 1: "source"}, "decoder_input_ids": dict(TARGET)}
    else:
        _drop_pooler(model)
        module, task, output = Encoder(model), "encoder", "last_hidden_state"
        ids = _tokens(config, device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        dynamic = {"input_ids": dict(TOKENS), "attention_mask": dict(TOKENS)}
    context = _context_length(config)
    if task == "seq2seq":
        decoding, context = decoding or _decoding(model, tokenizer), context or WRITTEN
    generation = _generation(model) if causal else {}
    loaded = LoadedModel(
        name, kind, finish(module), task, tokenizer, inputs, dynamic, output, context, facts, processor, decoding, generation
    )
    return check_forward(loaded) if check and not causal else loaded


def _generation(model: Any) -> dict[str, Any]:
    """What a decoder's generation configuration sets: sampling, tokens that end a text."""
    settings = getattr(model, "generation_config", None)
    found: dict[str, Any] = {} if settings is None else settings.to_diff_dict()
    return {key: value for key, value in found.items() if key != "transformers_version" and not key.startswith("_")}


def _options(model: nn.Module) -> dict[str, Any]:
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {}
    if "use_cache" in accepted:
        options["use_cache"] = False
    if "return_dict" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        options["return_dict"] = True
    return options


def _decoding(model: Any, tokenizer: Any | None) -> Decoding | None:
    """What the configurations say of how texts begin and what they never hold; None where they name no token to begin with.

    A tokenizer that puts that token and others before a text (Whisper's: the language, the task, no time stamps) says the others.
    """

    def setting(name: str) -> Any:
        found = (getattr(where, name, None) for where in (getattr(model, "generation_config", None), model.config))
        return next((value for value in found if value is not None), None)

    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start  # as ``generate`` of transformers does
    if start is None:
        return None
    forced = setting("forced_bos_token_id")
    never = [*(setting("suppress_tokens") or ()), *(words[0] for words in setting("bad_words_ids") or () if len(words) == 1)]
    begin: tuple[int, ...] = (int(start),) if forced is None else (int(start), int(forced))
    framed = [] if tokenizer is None else list(tokenizer(text_target="a")["input_ids"])
    bare = [] if tokenizer is None else list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if framed[:1] == [start] and framed != bare and framed[1:] != bare:
        at = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 1)
        begin = tuple(map(int, framed[:at]))
    return Decoding(begin, tuple(never), tuple(setting("begin_suppress_tokens") or ()))


def _has_head(model: Any) -> bool:
    return model.get_output_embeddings() is not None


def _compute_everything(model: Any) -> None:
    # The encoder-decoder classes read this from the decoder's configuration, whatever the call says.
    for part in (model.config, getattr(getattr(model, "decoder", None), "config", model.config)):
        part.use_cache = False


def _drop_pooler(model: Any) -> None:
    # The output does not pass through it, and a checkpoint without one would leave it random: a new fingerprint at each load.
    if "add_pooling_layer" in inspect.signature(type(model).__init__).parameters and hasattr(model, "pooler"):
        model.pooler = None


def _tokens(config: Any, device: torch.device) -> Tensor:
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 2))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (EXAMPLE_BATCH, EXAMPLE_SEQUENCE), generator=generator).to(device)


def _images(config: Any, like: Tensor, name: str, processor: Any | None) -> Tensor:
    size = getattr(config, "image_size", None) if processor is None else _prepared_size(processor)
    if size is None:
        raise ModelError(
            f"{name}: the configuration of this {config.model_type!r} model does not say its image size",
            hint=_BY_FACTORY,
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    shape = (EXAMPLE_BATCH, int(getattr(config, "num_channels", 3)), int(height), int(width))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _prepared_size(processor: Any) -> tuple[int, int]:
    """Height and width of what a processor makes of an image."""
    height, width = processor(images=[np.zeros((512, 640, 3), np.uint8)], return_tensors="pt")["pixel_values"].shape[-2:]
    return int(height), int(width)


def _features(config: Any, like: Tensor, name: str, processor: Any | None) -> Tensor:
    """Log-mel features of the one length that the encoder's positions fit: it halves the frames.

    Raises:
        ModelError: the configuration does not say it, or the feature extractor makes another.
    """
    bins, positions = (getattr(config, key, None) for key in ("num_mel_bins", "max_source_positions"))
    if bins is None or positions is None:
        raise ModelError(
            f"{name}: the configuration of this {config.model_type!r} model does not say its mel bins and positions", hint=_BY_FACTORY
        )
    shape = (EXAMPLE_BATCH, int(bins), 2 * int(positions))
    if processor is not None:
        silence = np.zeros(processor.sampling_rate, np.float32)
        made = processor(silence, sampling_rate=processor.sampling_rate, return_tensors="np")[processor.model_input_names[0]]
        if made.shape[1:] != shape[1:]:
            raise ModelError(
                f"{name}: its feature extractor makes mel bins and frames {list(made.shape[1:])}, its encoder takes {list(shape[1:])}",
                hint="give the model the preprocessor_config.json that it was trained with",
            )
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)


def _context_length(config: Any) -> int | None:
    text = config.get_text_config()
    for key in ("max_position_embeddings", "max_target_positions", "n_positions", "max_seq_len", "seq_length", "n_ctx"):
        if isinstance(value := getattr(text, key, None), int) and value > 0:
            return value
    return None
