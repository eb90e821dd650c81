"""Models that a user's own Python function builds: ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyncomp.errors import DyncompError, ModelError
from dyncomp.models.loaded import Decoding, LoadedModel, check_forward, finish, first_line

_SHAPE = "return (module, example_inputs), or a dict with the keys module and example_inputs, or a dyncomp LoadedModel"
_KEYS = (
    "module", "example_inputs", "dynamic_dims", "task", "tokenizer", "processor", "output_name", "context_length", "config", "decoding",
)  # fmt: skip
_TASKS = ("causal-lm", "seq2seq", "encoder", "image-encoder", "other")


def load_factory(source: str, *, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Call ``module:function`` (found as from the working directory) and check what it returns.

    The function takes no arguments and returns one of: a tuple of a module and its example inputs; a dict with the keys
    ``module``, ``example_inputs`` and optionally ``dynamic_dims``, ``task``, ``tokenizer``, ``processor`` (of images or sound),
    ``output_name``, ``context_length``, ``config``, ``decoding`` (of an encoder–decoder: a :class:`~dyncomp.models.loaded.Decoding`); a
    :class:`LoadedModel`; or a Hugging Face model alone. Example inputs are a dict of
    tensors by argument name, or a tuple in the order of ``forward``. Without ``dynamic_dims``, dimension 0 of every input
    is the batch, and dimension 1 of integer inputs (and of others of the same size) the sequence.

    Raises:
        ModelError: the function cannot be imported or called, or what it returns cannot be used; says which, and why.
    """
    return describe(_call(source), source, kind="factory", dtype=dtype)


def describe(result: Any, source: str, *, kind: str, dtype: torch.dtype) -> LoadedModel:
    """What a factory returned (or a caller has in memory), checked; see :func:`load_factory`.

    Args:
        source: what to call it.
    """
    if isinstance(result, LoadedModel):
        fields: dict[str, Any] = {key: getattr(result, key) for key in _KEYS}
    elif isinstance(result, Mapping):
        fields = dict(result)
    elif isinstance(result, tuple) and len(result) == 2:
        fields = {"module": result[0], "example_inputs": result[1]}
    elif isinstance(result, nn.Module):
        return _bare_module(source, result, dtype, kind)
    else:
        raise ModelError(f"{source} returned a {_kind(result)}", hint=_SHAPE)
    if unknown := sorted(set(fields) - set(_KEYS)):
        raise ModelError(f"{source} returned the unknown keys {', '.join(map(str, unknown))}", hint=f"the keys are {', '.join(_KEYS)}")
    for key in ("module", "example_inputs"):
        if key not in fields:
            raise ModelError(f"{source} returned no {key!r}", hint=_SHAPE)
    module = fields["module"]
    if not isinstance(module, nn.Module):
        raise ModelError(f"{source}: the module is a {_kind(module)}, not a torch.nn.Module", hint=_SHAPE)
    task = fields.get("task", "other")
    if task not in _TASKS:
        raise ModelError(f"{source}: the task {task!r} is unknown", hint=f"one of {', '.join(_TASKS)}")
    decoding = fields.get("decoding")
    if decoding is not None and not isinstance(decoding, Decoding):
        raise ModelError(f"{source}: the decoding is a {_kind(decoding)}", hint="a dyncomp.models.loaded.Decoding(begin=(0,))")
    inputs = _inputs(source, module, fields["example_inputs"])
    outputs = {"causal-lm": "logits", "seq2seq": "logits", "encoder": "last_hidden_state", "image-encoder": "last_hidden_state"}
    loaded = LoadedModel(
        name=source,
        kind=kind,
        module=finish(module.to(dtype)),
        task=task,
        tokenizer=fields.get("tokenizer"),
        example_inputs={key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()},
        dynamic_dims=_dynamic_dims(source, inputs, fields.get("dynamic_dims")),
        output_name=fields.get("output_name") or outputs.get(task, "output"),
        context_length=fields.get("context_length"),
        config=fields.get("config") or {"class": f"{type(module).__module__}.{type(module).__qualname__}"},
        processor=fields.get("processor"),
        decoding=decoding,
    )
    return check_forward(loaded)


def _call(source: str) -> Any:
    module_name, _, function_name = source.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # the console script does not search the working directory, where a user's module usually is
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, function_name, None)
        if function is None:
            offered = ", ".join(name for name, value in vars(module).items() if inspect.isfunction(value) and not name.startswith("_"))
            raise ModelError(f"the module {module_name!r} has no function {function_name!r}; it has {offered or 'none'}")
        if not callable(function):
            raise ModelError(f"{source} is a {_kind(function)}, not a function", hint=_SHAPE)
        return function()
    except DyncompError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ModelError(f"there is no Python module {error.name!r} to take {source!r} from (searched {here} and sys.path)") from error
        raise ModelError(f"{source} needs the Python module {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ModelError(f"{source} failed: {first_line(error)}", hint="a factory is called without arguments") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)


def _bare_module(source: str, module: Any, dtype: torch.dtype, kind: str) -> LoadedModel:
    # Only a Hugging Face model says what it takes.
    if not hasattr(module, "main_input_name") or not hasattr(module, "config"):
        raise ModelError(f"{source} returned a module without example inputs", hint=_SHAPE)
    from dyncomp.models.wrap import is_causal_lm, wrap

    has_head = hasattr(module, "get_output_embeddings") and module.get_output_embeddings() is not None
    causal = has_head and is_causal_lm(module.config)
    return wrap(module.to(dtype), name=source, kind=kind, tokenizer=None, causal=causal)


def _inputs(source: str, module: nn.Module, given: Any) -> dict[str, Tensor]:
    if isinstance(given, Tensor):
        given = (given,)
    if isinstance(given, (tuple, list)):
        names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(given) > len(names):
            takes = f"forward of {_kind(module)} takes {len(names)} ({', '.join(names)})"
            raise ModelError(f"{source}: {len(given)} example inputs, but {takes}")
        given = dict(zip(names, given, strict=False))
    if not isinstance(given, Mapping) or not given:
        raise ModelError(
            f"{source}: the example inputs are {_kind(given)}", hint="give a dict of tensors by argument name, or a tuple of tensors"
        )
    for key, value in given.items():
        if not isinstance(value, Tensor):
            raise ModelError(f"{source}: the example input {key!r} is a {_kind(value)}, not a tensor")
    return dict(given)


def _dynamic_dims(source: str, inputs: Mapping[str, Tensor], given: Any) -> dict[str, dict[int, str]]:
    if given is None:
        # The second dimension of token ids is the sequence, and so is that of whatever runs beside them.
        lengths = {value.shape[1] for value in inputs.values() if value.dim() >= 2 and not value.is_floating_point()}
        default: dict[str, dict[int, str]] = {}
        for key, value in inputs.items():
            default[key] = {0: "batch"} if value.dim() else {}
            if value.dim() >= 2 and value.shape[1] in lengths:
                default[key][1] = "sequence"
        given = default
    if not isinstance(given, Mapping):
        raise ModelError(f"{source}: dynamic_dims is a {_kind(given)}", hint='like {"input_ids": {0: "batch", 1: "sequence"}}')
    for key, dims in given.items():
        if key not in inputs:
            raise ModelError(f"{source}: dynamic_dims names {key!r}, which is no example input ({', '.join(inputs)})")
        shape = inputs[key].shape
        for dim, label in dims.items() if isinstance(dims, Mapping) else [(dims, None)]:
            if not isinstance(dim, int) or not isinstance(label, str):
                raise ModelError(f"{source}: dynamic_dims[{key!r}] is {dims!r}", hint='like {0: "batch", 1: "sequence"}')
            if not 0 <= dim < len(shape):
                raise ModelError(f"{source}: dynamic_dims[{key!r}] names dimension {dim}, but the example has the shape {list(shape)}")
            if shape[dim] < 2:
                raise ModelError(
                    f"{source}: dimension {dim} ({label}) of {key!r} is to be dynamic, but the example has size {shape[dim]} there",
                    hint="use an example of size 2 or more: torch.export treats 0 and 1 as constants",
                )
    return {key: dict(given.get(key, {})) for key in inputs}


def _kind(value: Any) -> str:
    return f"tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
