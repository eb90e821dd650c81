"""Programs that ``torch.export.save`` wrote (``.pt2``), loaded without running a pickle."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from dyncomp.errors import ModelError
from dyncomp.models.loaded import LoadedModel, check_forward, first_line

_AGAIN = "save it again with torch.export.save"


class ProgramModule(nn.Module):
    """An exported program as a module that takes its inputs by name. ``program`` is flat: tensors in, tensors out."""

    def __init__(self, program: fx.GraphModule, positional: list[str], keyword: list[str]) -> None:
        super().__init__()
        self.program = program
        names = positional + keyword
        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Tensor) for name in names]

        def forward(**inputs: Tensor) -> Tensor:
            output = self.program(*(inputs[name] for name in positional), **{name: inputs[name] for name in keyword})
            while isinstance(output, (tuple, list)) and len(output) == 1:
                output = output[0]
            return output

        # torch.export reads the argument names from here; `**inputs` alone would become one nested input.
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward
        self.training = False

    def train(self, mode: bool = True) -> ProgramModule:
        # The mode of an exported program is fixed in its graph, and torch refuses train() and eval() on it.
        return self


def load_program(path: Path, *, name: str) -> LoadedModel:
    """Load a ``.pt2`` file. Its weights keep the dtype they were exported with; dropout is turned off.

    Raises:
        ModelError: the file is damaged, holds pickled objects or native code, was saved by another torch, or uses
            operators that are not registered.
    """
    _inspect(path)
    with contextlib.suppress(ImportError):
        import dyncomp.ops  # noqa: F401 - a converted model is written in its operators
    try:
        with _no_pickle():
            program = torch.export.load(path)
    except Exception as error:
        raise ModelError(f"{path} cannot be loaded by torch {torch.__version__}: {first_line(error)}", hint=_AGAIN) from error
    positional, keyword, values = _inputs(program, path)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.dropout.default:
            node.args = (*node.args[:2], False)
    module.recompile()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    loaded = LoadedModel(
        name=name,
        kind="pt2",
        module=ProgramModule(module, positional, keyword),
        task="other",
        tokenizer=None,
        example_inputs=values,
        dynamic_dims=_dynamic_dims(program, list(values)),
        output_name="output",
        config={"source": "torch.export"},
    )
    return check_forward(loaded)


def _inspect(path: Path) -> None:
    """Look into the archive before torch does: it unpickles, and its errors for a damaged file say little."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            file.seek(max(0, size - 22))
            # The example inputs are a zip archive inside this one, and zipfile would take theirs for the end of a truncated file.
            if file.read(4) != b"PK\5\6":
                raise zipfile.BadZipFile
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if (damaged := archive.testzip()) is not None:
                raise ModelError(f"{path} is damaged: the checksum of {damaged!r} inside it is wrong", hint="copy the file again")
            bodies = {n: archive.read(n) for n in names if (n.endswith(".json") and "/models/" in f"/{n}") or n.endswith("_config.json")}
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{path} is truncated or damaged, or is no .pt2 file: its {size} bytes are not a whole zip archive",
            hint=f"copy the file again, or {_AGAIN}",
        ) from error
    programs = [body for n, body in bodies.items() if "/models/" in f"/{n}"]
    if not programs:
        raise ModelError(f"{path} is a zip archive without an exported program in it", hint=_AGAIN)
    for n in names:
        part = n.rsplit("/", 1)[-1]
        if part.startswith(("custom_obj_", "opaque_obj_")) or "/aotinductor/" in f"/{n}":
            raise ModelError(
                f"{path} holds the pickled object or native code {n!r}; dyncomp loads neither", hint="export a model of plain tensors"
            )
    for n, body in bodies.items():
        if n.endswith("_config.json") and re.search(rb'"use_pickle":\s*true', body):
            raise ModelError(f"{path} holds pickled tensors ({n}); dyncomp never loads a pickle", hint="export a model of plain tensors")
    with contextlib.suppress(ImportError):
        import dyncomp.ops  # noqa: F401
    used = {match for body in programs for match in re.findall(r'"target":\s*"torch\.ops\.(\w+)\.(\w+)', body.decode("utf-8", "replace"))}
    if unknown := sorted(f"{space}::{op}" for space, op in used if not hasattr(getattr(torch.ops, space), op)):
        raise ModelError(
            f"{path} uses operators that are not registered: {', '.join(unknown)}",
            hint="import the package that defines them, then load again",
        )


@contextlib.contextmanager
def _no_pickle() -> Iterator[None]:
    """Let torch.load read tensors only, for the example inputs in the file: torch.export.load would fall back to a full unpickler."""
    key = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(key)
    logger = logging.getLogger("torch.export")
    level = logger.level
    os.environ[key] = "1"
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _inputs(program: torch.export.ExportedProgram, path: Path) -> tuple[list[str], list[str], dict[str, Tensor]]:
    if program.example_inputs is None:
        raise ModelError(f"{path} was saved without example inputs", hint=_AGAIN)
    args, kwargs = program.example_inputs
    values = [*args, *kwargs.values()]
    if not values or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
        raise ModelError(
            f"{path} takes {kinds}; dyncomp needs programs whose inputs are all tensors", hint="export a module that takes tensors only"
        )
    names = [str(name) for name in program.graph_signature.user_inputs[: len(args)]]
    return names, list(kwargs), dict(zip([*names, *kwargs], values, strict=True))


def _dynamic_dims(program: torch.export.ExportedProgram, names: list[str]) -> dict[str, dict[int, str]]:
    """Dimensions the program left symbolic; those of one symbol share one name."""
    placeholders = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    taken: dict[str, str] = {}
    dims: dict[str, dict[int, str]] = {}
    for name, target in zip(names, program.graph_signature.user_inputs, strict=True):
        dims[name] = {}
        for dim, size in enumerate(placeholders[str(target)].shape):
            if isinstance(size, int):
                continue
            usual = {0: "batch", 1: "sequence"}.get(dim, f"{name}_{dim}")
            taken.setdefault(str(size), usual if usual not in taken.values() else f"{name}_{dim}")
            dims[name][dim] = taken[str(size)]
    return dims
