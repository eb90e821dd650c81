"""Writing a checkpoint that ``from_pretrained`` of a stock class loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from dyncomp.backends.hf.architectures import ARCHITECTURES, TOPK, Architecture
from dyncomp.backends.hf.shape import Shape, shape_of
from dyncomp.backends.hf.tensors import configuration, tensors

from dyncomp.errors import BackendError, RequestError
from dyncomp.graph import Graph
from dyncomp.models.extras import quiet
from dyncomp.regions.decoder import Decoder, find_decoder
from dyncomp.regions.refusal import Refusal

SHARD = "4GB"


def explain(graph: Graph) -> tuple[Decoder | None, Shape | None, dict[str, list[str]]]:
    """The decoder that a graph is, its shape, and for each architecture why it cannot hold it (nothing when it can)."""
    decoder = find_decoder(graph)
    if isinstance(decoder, Refusal):
        return None, None, {name: [f"{decoder.where}: {decoder.reason}"] for name in ARCHITECTURES}
    shape, problems = shape_of(decoder)
    if shape is None:
        return decoder, None, {name: problems if a.routed else ["it has no experts, the model has"] for name, a in ARCHITECTURES.items()}
    return decoder, shape, {name: [*problems, *a.reasons(shape)] for name, a in ARCHITECTURES.items()}


def choose(graph: Graph, name: str, *, among: Sequence[str] = tuple(ARCHITECTURES)) -> tuple[Architecture, Decoder, Shape]:
    """The architecture of that name, or the first that fits for ``auto``.

    Raises:
        RequestError: there is no such architecture.
        BackendError: it cannot hold the model, or none can; says why.
    """
    if name != "auto" and name not in among:
        raise RequestError(f"there is no architecture {name!r} here", hint=f"architectures: auto, {', '.join(among)}")
    decoder, shape, reasons = explain(graph)
    wanted = list(among) if name == "auto" else [name]
    for candidate in wanted:
        if not reasons[candidate] and decoder is not None and shape is not None:
            return ARCHITECTURES[candidate], decoder, shape
    lines = "".join(f"\n  {candidate}: {'; '.join(reasons[candidate])}" for candidate in wanted)
    raise BackendError(f"no architecture holds this model:{lines}", hint=TOPK)


def write(
    decoder: Decoder, shape: Shape, architecture: Architecture, folder: Path, *, source: dict[str, Any], temper: int, dtype: torch.dtype,
    generation: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Write configuration, generation configuration and weights (sharded above :data:`SHARD`) into ``folder``; returns what to know of it.

    The stock class writes them itself, in the layout its published checkpoints have.

    Args:
        source: the dense model's configuration. generation: what its generation configuration set.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = configuration(architecture, decoder, shape, source, dtype)
    with quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.load_state_dict(tensors(architecture, decoder, shape, temper, dtype), strict=True, assign=True)
        model.tie_weights()
        notes = []
        if generation:
            settings = GenerationConfig(**generation)
            try:
                settings.validate(strict=True)
                model.generation_config = settings
            except ValueError as error:  # as of checkpoints with a temperature and do_sample=False, which are read, but not written
                notes.append(
                    f"the source's generation settings are left out, transformers does not write them: {str(error).splitlines()[0]}"
                )
        model.save_pretrained(folder, max_shard_size=SHARD)
    return notes
