"""What every source of models comes back as: a module with its inputs, whatever it was read from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from dyncomp.errors import ModelError
from dyncomp.mapped import trim

# Two sequences of sixteen tokens: torch.export specialises on sizes 0 and 1, so a dynamic dimension starts at 2 or more.
EXAMPLE_BATCH, EXAMPLE_SEQUENCE = 2, 16

_HASHED = 1 << 26  # bytes at a time

WRITES = ("causal-lm", "seq2seq")
"""The tasks whose output is the logits of the tokens that are written."""

# What says where a configuration came from, not what the model is. Left out, so that equal models have equal configurations.
_PROVENANCE = {"transformers_version", "quantization_config", "dtype", "torch_dtype", "name_or_path"}


@dataclass(frozen=True)
class Decoding:
    """How an encoder–decoder writes.

    Args:
        begin: the tokens that every text begins with, at least one.
        never: tokens that are never chosen; ``never_first``: nor as the first one.
    """

    begin: tuple[int, ...]
    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()


@dataclass
class LoadedModel:
    """A dense model, ready to be traced.

    ``module(**example_inputs)`` returns one tensor. The module is in inference mode (``eval``), its parameters have the
    dtype that was asked for and need no gradients.
    """

    name: str  # what the user asked for: "smollm2-135m", "models/llama", "my.module:factory"
    kind: str  # "huggingface" | "gguf" | "pt2" | "factory" | "packaged" | "ctranslate2"
    module: nn.Module
    task: str  # "causal-lm" | "seq2seq" (an encoder and a decoder) | "encoder" | "image-encoder" | "other"
    tokenizer: Any | None  # a Hugging Face fast tokenizer
    example_inputs: dict[str, Tensor]
    dynamic_dims: dict[str, dict[int, str]]  # {"input_ids": {0: "batch", 1: "sequence"}}
    output_name: str  # "logits" | "last_hidden_state" | "output"
    context_length: int | None = None  # tokens
    config: dict[str, Any] = field(default_factory=dict)  # plain JSON: the architecture, without where it came from
    processor: Any | None = None  # an image processor or feature extractor of transformers
    decoding: Decoding | None = None  # of an encoder–decoder
    generation: dict[str, Any] = field(default_factory=dict)  # of a decoder: what its generation_config.json sets

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the configuration, the input sizes that are fixed (an image's), how an encoder–decoder writes, and every tensor's
        name, shape, dtype and bytes: equal for equal models.

        Computed on first use (about a second a gigabyte) and then kept, so read it before changing the module. On the meta
        device, where tensors have no bytes, it covers the rest.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        dynamic = self.dynamic_dims
        fixed = {n: [s for i, s in enumerate(t.shape) if i not in dynamic.get(n, {})] for n, t in self.example_inputs.items()}
        if any(fixed.values()):
            digest.update(json.dumps(fixed, sort_keys=True).encode())
        if self.decoding is not None:
            digest.update(json.dumps(asdict(self.decoding)).encode())
        first_name: dict[tuple[Any, ...], str] = {}
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            if tensor.is_meta:
                continue
            # Tied weights are hashed once: a vocabulary matrix is a large part of a small model.
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
            if tensor.numel() and key in first_name:
                digest.update(f"is {first_name[key]}".encode())
                continue
            first_name[key] = name
            for part in tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).split(_HASHED):
                digest.update(memoryview(part.numpy()))
                trim()
        return digest.hexdigest()


def plain_config(config: Any) -> dict[str, Any]:
    """A Hugging Face configuration as JSON-able facts about the architecture only."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): clean(v) for k, v in value.items() if str(k) not in _PROVENANCE and not str(k).startswith("_")}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)

    return clean(config.to_dict())


def finish(module: nn.Module) -> nn.Module:
    """Inference mode, no gradients: healing turns them on again for what it trains."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def check_forward(loaded: LoadedModel) -> LoadedModel:
    """Run the example inputs once, so that a model which cannot run is refused here and not in the middle of a trace.

    Raises:
        ModelError: the forward pass fails, or returns something other than one tensor.
    """
    try:
        with torch.no_grad():
            output = loaded.module(**loaded.example_inputs)
    except Exception as error:
        inputs = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in loaded.example_inputs.items())
        raise ModelError(
            f"{loaded.name}: the forward pass fails on the example inputs {inputs}: {first_line(error)}",
            hint="wrap the model in a factory (module:function) that returns a module and inputs it accepts",
        ) from error
    if not isinstance(output, Tensor):
        raise ModelError(
            f"{loaded.name}: the forward pass returns a {type(output).__name__}, not one tensor",
            hint="wrap the model in a factory (module:function) whose module returns the one tensor to keep",
        )
    return loaded


def first_line(error: BaseException) -> str:
    """The error's type and the first line of its message, for use inside another message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
