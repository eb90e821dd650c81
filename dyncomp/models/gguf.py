"""GGUF files, dequantized into the model of transformers that the file's architecture names."""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dyncomp.errors import ModelError
from dyncomp.models.extras import quiet, require
from dyncomp.models.gguf_file import ARRAY, STRING, GgufFile, Value, read_gguf
from dyncomp.models.huggingface import from_pretrained, load_architecture
from dyncomp.models.loaded import LoadedModel, first_line
from dyncomp.models.wrap import is_causal_lm, wrap
from dyncomp.replaced import replaced


def load_gguf(path: Path, *, name: str, dtype: torch.dtype = torch.float32, kind: str = "gguf") -> LoadedModel:
    """Load a GGUF file: weights (dequantized to ``dtype``), configuration, tokenizer and chat template.

    Raises:
        ModelError: the file is damaged or truncated, or of an architecture transformers cannot load.
        MissingExtraError: transformers, gguf or accelerate is not installed.
    """
    file = _open(path)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    folder, options = str(path.parent), {"gguf_file": path.name}
    with quiet(), _header_read_once(file):
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
            causal = is_causal_lm(config)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, config=config, **options)
        except Exception as error:
            raise ModelError(f"{path}: transformers cannot read the header: {first_line(error)}") from error
        auto = AutoModelForCausalLM if causal else AutoModel
        model = from_pretrained(auto, folder, name=str(path), config=config, dtype=dtype, **_dequantized(path), **options)
    return wrap(_plain(model), name=name, kind=kind, tokenizer=tokenizer, causal=causal)


def load_gguf_architecture(path: Path, *, name: str) -> LoadedModel:
    """The model of a GGUF file on the meta device: its header is read, its weights are not."""
    file = _open(path)
    from transformers import AutoConfig

    with quiet(), _header_read_once(file):
        try:
            config = AutoConfig.from_pretrained(str(path.parent), local_files_only=True, gguf_file=path.name)
        except Exception as error:
            raise ModelError(f"{path}: transformers cannot read the header: {first_line(error)}") from error
    return load_architecture(config, name=name)


def _open(path: Path) -> GgufFile:
    """The header, checked against the file's size, of an architecture that can be loaded."""
    for package in ("transformers", "gguf", "accelerate"):
        require(package, needed_for="loading a GGUF file")
    from gguf import GGML_QUANT_SIZES

    file = read_gguf(path, {int(key): sizes for key, sizes in GGML_QUANT_SIZES.items()})
    if file.architecture not in (supported := supported_architectures()):
        raise ModelError(
            f"{path} holds a model of the architecture {file.architecture!r}, which transformers cannot load from GGUF; "
            f"it loads {', '.join(supported)}",
            hint="use the model's Hugging Face directory (safetensors) instead",
        )
    return file


def supported_architectures() -> list[str]:
    """What ``general.architecture`` may say for the installed transformers."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    names = set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"}
    # The file's names differ from transformers' for some; both are accepted there.
    aliases = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss", "t5encoder": "t5", "minimax-m2": "minimax_m2"}
    names |= {gguf for gguf, hf in aliases.items() if hf in names}
    with contextlib.suppress(ImportError):  # the newer of transformers' two loaders
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS

        names |= set(GGUF_CONFIG_ARCHS)
    return sorted(names)


def _dequantized(path: Path) -> dict[str, Any]:
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # before it, transformers always dequantized
        return {}
    return {"quantization_config": GgufConfig(gguf_file=path.name, dequantize=True)}


def _plain(model: Any) -> nn.Module:
    # These mark the model as quantized, which it no longer is; save_pretrained refuses it while they are there.
    for owner, attribute in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    if hasattr(model, "is_quantized"):
        model.is_quantized = False
    return model


@dataclass(frozen=True)
class _Field:
    """A metadata entry the way ``gguf.ReaderField`` shows it to transformers."""

    parts: list[Any]
    data: list[int]
    types: list[int]


@dataclass(frozen=True)
class _Tensor:
    name: str
    data: np.ndarray
    tensor_type: Any


class _Reader:
    """What transformers uses of ``gguf.GGUFReader``, made from a header that is already read."""

    def __init__(self, file: GgufFile) -> None:
        from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

        with file.path.open("rb") as stream:
            data = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
        self.fields = {key: _field(value) for key, value in file.metadata.items()}
        self.tensors = []
        for entry in file.tensors:
            kind = GGMLQuantizationType(entry.type_id)
            bytes_ = data[entry.offset : entry.offset + entry.size]
            self.tensors.append(_Tensor(entry.name, bytes_.reshape(quant_shape_to_byte_shape(entry.shape, kind)), kind))


def _field(value: Value) -> _Field:
    elements = value.value if value.types[0] == ARRAY else [value.value]
    parts = elements if value.types[-1] == STRING else [np.array([element]) for element in elements]
    return _Field(parts, list(range(len(parts))), list(value.types))


@contextlib.contextmanager
def _header_read_once(file: GgufFile) -> Iterator[None]:
    """Let transformers use the header already read, and one table of tensor names.

    It parses the file once for the configuration, once for the tokenizer and once for the weights, and builds the table of
    names anew for every submodule: 17 of the 19 seconds that SmolLM2-135M took. Should it stop using these two
    functions, this changes nothing.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    reader = functools.cache(lambda: _Reader(file))
    with replaced(
        (gguf, "GGUFReader", lambda *_: reader()),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (loader, "tqdm", lambda items, **_: items),
    ):
        yield
