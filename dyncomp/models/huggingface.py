"""Hugging Face models: a directory with safetensors, a hub id, or a bare configuration."""

from __future__ import annotations

import difflib
import importlib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dyncomp.errors import DyncompError, ModelError
from dyncomp.mapped import TensorStore, read_tensors, release
from dyncomp.models.checkpoint import check_weights, read_config
from dyncomp.models.extras import quiet, require
from dyncomp.models.loaded import LoadedModel, first_line
from dyncomp.models.wrap import auto_class, is_causal_lm, wrap

HUB_TIMEOUT = 5.0  # seconds to wait for a hub's first answer
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
PROCESSOR = "preprocessor_config.json"
_PROCESSORS = (PROCESSOR, "processor_config.json")  # the other is what transformers 5 writes beside a tokenizer
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def load_directory(
    folder: Path, *, name: str, dtype: torch.dtype = torch.float32, kind: str = "huggingface", store: TensorStore | None = None
) -> LoadedModel:
    """Load a directory that ``save_pretrained`` wrote. Code that comes with a model is never run, nor a pickle read.

    Args:
        store: where the weights are put, one by one as they are read; None loads them into memory.

    Raises:
        ModelError: the directory is incomplete, damaged, or of an architecture that transformers does not know.
        MissingExtraError: transformers is not installed.
    """
    config_dict = read_config(folder)
    require("transformers", needed_for="loading a Hugging Face model")
    from transformers import GenerationConfig

    config = _config(config_dict, str(folder))
    files = check_weights(folder)
    causal = is_causal_lm(config)
    auto = auto_class(config)
    if store is None or "quantization_config" in config_dict:  # what is packed must be unpacked by who knows how
        model: Any = from_pretrained(auto, str(folder), name=name, config=config, dtype=dtype, use_safetensors=True)
    else:
        kind_of_model = type(_on_meta(auto, config, name))  # the Auto classes take no weights
        model = from_pretrained(kind_of_model, None, name=name, config=config, dtype=dtype, state_dict=_stored(files, dtype, store))
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    if store is not None:
        store.adopt(model)
        release()
    return wrap(model, name=name, kind=kind, tokenizer=load_tokenizer(folder), processor=_processor(model, folder), causal=causal)


def _stored(files: list[Path], dtype: torch.dtype, store: TensorStore) -> dict[str, torch.Tensor]:
    """Every tensor of the files, in ``dtype`` where it is floating point."""
    found = {}
    for file in files:
        for name, value in read_tensors(file).items():
            found[name] = store.put(value, dtype if value.is_floating_point() else None)
    return found


def load_architecture(source: Any, *, name: str | None = None) -> LoadedModel:
    """Build a model on the meta device: shapes and code, no weights, so that a model of any size can be traced.

    Args:
        source: a Hugging Face directory, the path of a config.json, or a configuration object of transformers.
        name: what to call it; by default what ``source`` is.

    Returns:
        a LoadedModel whose parameters and example inputs are on the meta device.

    Raises:
        ModelError: there is no such configuration, or transformers cannot build it.
    """
    require("transformers", needed_for="building a Hugging Face architecture")
    from transformers import PreTrainedConfig

    folder = None
    if isinstance(source, PreTrainedConfig):
        config, name = source, name or f"{source.model_type} configuration"
    else:
        path = Path(source)
        if not path.exists():
            raise ModelError(f"no such file or directory: {path}", hint="give a Hugging Face directory or a config.json")
        name, config = name or str(source), _config(read_config(path if path.is_dir() else path.parent), str(path))
        folder = path if path.is_dir() else None
    causal = is_causal_lm(config)
    auto = auto_class(config)
    model = _on_meta(auto, config, name)
    return wrap(model, name=name, kind="huggingface", tokenizer=None, processor=_processor(model, folder), causal=causal, check=False)


def _on_meta(auto: Any, config: Any, name: str) -> nn.Module:
    with quiet(), torch.device("meta"):
        try:
            model: nn.Module = _with_attention(lambda **kwargs: auto.from_config(config, dtype=torch.float32, **kwargs))
        except Exception as error:
            raise ModelError(f"{name}: transformers cannot build this architecture: {first_line(error)}") from error
    return model


def load_hub(model_id: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load ``owner/name`` from the local hub cache or from the hub, within seconds when none answers.

    Raises:
        ModelError: no hub answers and the cache has no copy, the hub has no such model, or its files are unfit.
    """
    require("huggingface_hub", needed_for=f"fetching {model_id!r} from a hub")
    from huggingface_hub import snapshot_download

    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    refusal = "HF_HUB_OFFLINE is set" if offline else _probe_hub(model_id)
    with quiet():
        try:
            folder = snapshot_download(model_id, allow_patterns=_HUB_FILES, local_files_only=refusal is not None)
        except Exception as error:
            reason = f"{refusal}, and the local cache has no copy" if refusal else first_line(error)
            raise ModelError(
                f"there is no local directory {model_id!r}, and it cannot be fetched from a hub: {reason}",
                hint="give a local directory, a .gguf file, or a packaged model (smollm2-135m, minilm, dinov2-small, whisper-tiny.en)",
            ) from error
    return load_directory(Path(folder), name=model_id, dtype=dtype)


def from_pretrained(auto: Any, location: str | None, *, name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """``auto.from_pretrained``, local and silent, with every parameter accounted for.

    Raises:
        ModelError: transformers refuses, or the weights do not cover the architecture.
    """
    with quiet():
        try:
            model, report = _with_attention(
                lambda **kwargs: auto.from_pretrained(
                    location, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options, **kwargs
                )
            )
        except DyncompError:
            raise
        except Exception as error:
            raise ModelError(
                f"{name}: transformers cannot load the model: {first_line(error)}", hint="check that config and weights belong together"
            ) from error
    if missing := sorted(key for key in report["missing_keys"] if "pooler" not in key):
        raise ModelError(
            f"{name}: the weights lack {len(missing)} tensors of the architecture, among them {', '.join(missing[:3])}",
            hint="check that config.json and the weights belong together",
        )
    return model


def _with_attention(build: Any) -> Any:
    try:
        return build(attn_implementation="sdpa")
    except ValueError as error:
        # A few architectures have no fused attention; theirs is then spelled out, which traces as well.
        if "scaled_dot_product_attention" not in str(error):
            raise
        return build(attn_implementation="eager")


def _config(values: dict[str, Any], where: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING.keys()), n=3)
        own_code = " (it comes with its own code, which dyncomp does not run)" if "auto_map" in values else ""
        raise ModelError(
            f"{where}: this transformers knows no model type {model_type!r}{own_code}" + (f"; near: {', '.join(near)}" if near else ""),
            hint="upgrade transformers, or write a factory (module:function) that builds the model",
        )
    with quiet():
        try:
            return AutoConfig.for_model(**values)
        except Exception as error:
            raise ModelError(f"{where}: config.json does not describe a {model_type!r} model: {first_line(error)}") from error


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer in a directory, or None when it holds none."""
    from transformers import AutoTokenizer

    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ModelError(
                f"the tokenizer in {folder} cannot be loaded: {first_line(error)}", hint="copy the tokenizer's files again"
            ) from error


def _processor(model: nn.Module, folder: Path | None) -> Any | None:
    """The processor of a model that takes images or sound."""
    takes = getattr(model, "main_input_name", None) in ("pixel_values", "input_features")
    return load_processor(folder) if folder is not None and takes else None


def load_processor(folder: Path) -> Any | None:
    """The image processor, or feature extractor of sound, in a directory; None when it holds none.

    Raises:
        ModelError: it cannot be loaded.
        MissingExtraError: pillow is not installed (images).
    """
    file = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    if file is None:
        return None
    what, auto = "the image processor", "image_processing_auto.AutoImageProcessor"
    if "sampling_rate" in file.read_text(errors="replace"):
        what, auto = "the feature extractor", "feature_extraction_auto.AutoFeatureExtractor"
    else:
        require("PIL", needed_for="preparing images")
    module, _, name = auto.partition(".")
    kind = getattr(importlib.import_module(f"transformers.models.auto.{module}"), name)
    with quiet():
        try:
            return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:
            raise ModelError(f"{what} in {folder} cannot be loaded: {first_line(error)}", hint=f"copy {file.name} again") from error


def _probe_hub(model_id: str) -> str | None:
    """Why no hub can be asked for ``model_id``, or None when one answers. The hub's own client retries for minutes; this asks once."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/api/models/{model_id}", headers={"User-Agent": "dyncomp"})
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return None
    except urllib.error.HTTPError as error:
        # A refusal is an answer: the hub's client knows how to log in, and says what is wrong.
        return f"{endpoint} answers with HTTP {error.code}" if error.code >= 500 else None
    except (OSError, ValueError) as error:
        return f"no hub answers at {endpoint} ({getattr(error, 'reason', error)})"
