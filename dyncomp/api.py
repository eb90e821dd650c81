"""``dyncomp.convert(model)`` for a notebook: a model or its name in, something that generates, trains and compiles out.

It is :func:`dyncomp.convert.convert` with its evidence; the bundle lies in a folder, a temporary one unless one is named.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncomp.bundle import Bundle, open_bundle
from dyncomp.convert import ConvertRequest, convert
from dyncomp.graph import Graph
from dyncomp.models.factory import describe
from dyncomp.models.loaded import LoadedModel
from dyncomp.report.progress import ProgressReporter
from dyncomp.runtime.generate import Generator, Prompt, Seq2SeqGenerator
from dyncomp.runtime.sampling import Sampling


class ConvertedModule(nn.Module):
    """A converted graph as a module: ``forward`` takes its inputs by position or name and returns its one output.

    Its parameters train (routers too: their gates have straight-through gradients). Quantized weights are there decoded, and their
    inputs are not rounded: for figures of what is deployed, run the bundle.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph.module.requires_grad_(True)
        self.inputs = tuple(spec.name for spec in graph.inputs)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        return self.graph(*(given[name] for name in self.inputs))[0]


class Converted:
    """A conversion.

    Attributes:
        report: quality, cost, speed: see ``docs/results.md`` for what it holds.
        module: a :class:`ConvertedModule`, read from the bundle on first use.
    """

    def __init__(self, folder: Path, backend: str, report: dict[str, Any], kept: Any = None) -> None:
        self.path, self.backend, self.report = folder, backend, report
        self._kept = kept  # a temporary folder lives as long as this object
        self._generator: Generator | Seq2SeqGenerator | None = None
        self._module: ConvertedModule | None = None

    @property
    def bundle(self) -> Bundle:
        return open_bundle(self.path)

    @property
    def module(self) -> ConvertedModule:
        if self._module is None:
            self._module = ConvertedModule(self.bundle.graph())
        return self._module

    def generate(self, prompt: Prompt, *, max_tokens: int = 128, **sampling: Any) -> str:
        """The text that follows ``prompt`` (text, or the messages of a conversation); of an encoder–decoder, the text that is written
        for it.

        Args:
            sampling: ``temperature``, ``top_p``, ``top_k``, ``stop``, ``seed`` as in :class:`~dyncomp.runtime.sampling.Sampling`.

        Raises:
            RequestError: the model does not generate text, or came without a tokenizer.
        """
        return self._writer().generate([prompt], Sampling(max_tokens=max_tokens, **sampling))[0].text

    def transcribe(self, *sounds: str | Path | tuple[np.ndarray[Any, Any], int], max_tokens: int = 256, **sampling: Any) -> list[str]:
        """What a model that hears writes for each sound: a .wav file, or (samples, float32 of one channel; samples a second).

        Raises:
            RequestError: the model takes no sound.
            SoundError: a file is damaged, or a sound longer than the model hears at a time.
        """
        from dyncomp.deploy import hear

        sources = hear(self.bundle, sounds)
        return [c.text.strip() for c in self._writer().generate(sources, Sampling(max_tokens=max_tokens, **sampling))]

    def _writer(self) -> Any:
        if self._generator is None:
            from dyncomp.deploy import open_generator

            self._generator = open_generator(self.bundle, self.backend)
        return self._generator

    def save(self, out: str | Path) -> None:
        """Copy the bundle to ``out``, which must not exist."""
        import shutil

        shutil.copytree(self.path, out)


def convert_model(
    model: str | nn.Module | LoadedModel, tokenizer: Any | None = None, *, processor: Any | None = None, example_inputs: Any = None,
    out: str | Path | None = None, show: bool = True, **options: Any,
) -> Converted:  # fmt: skip
    """Convert a model; see :class:`~dyncomp.convert.ConvertRequest` for ``options`` (``recipe``, ``active``, ``quantize`` …).

    Args:
        model: a name or path, as on the command line; a model of transformers; any module with ``example_inputs``.
        tokenizer: for text to calibrate on, with a module; a name brings its own. processor: the same for images or sound.
        example_inputs: of a module that does not say what it takes: tensors by argument name.
        out: folder of the bundle; a temporary one without.
        show: progress.
    """
    if isinstance(model, nn.Module):
        fields = model if example_inputs is None else {"module": model, "example_inputs": example_inputs}
        model = describe(fields, type(model).__name__, kind="memory", dtype=torch.float32)
    if isinstance(model, LoadedModel) and tokenizer is not None:
        model.tokenizer = tokenizer
    if isinstance(model, LoadedModel) and processor is not None:
        model.processor = processor
    kept = tempfile.TemporaryDirectory(prefix="dyncomp-") if out is None else None
    folder = Path(kept.name) / "bundle" if kept is not None else Path(str(out))
    request = ConvertRequest(model=model, out=folder, **options)
    if show:
        with ProgressReporter() as progress:
            report = convert(request, progress=progress, say=progress.say)
    else:
        report = convert(request)
    return Converted(folder, request.backend, report, kept)
