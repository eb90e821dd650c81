"""Run a lowered model through TVM's runtime alone: the compiler is not imported."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from dyncomp.backends.artifact import Array, as_array, first_line, read_config
from dyncomp.backends.tvm.layout import ALIGNMENT, LIBRARY, NATIVE, PARAMETERS, SCHEMA
from dyncomp.backends.tvm.machine import Machine, require_machine
from dyncomp.backends.tvm.native import instruction_set
from dyncomp.backends.tvm.require import require_runtime

from dyncomp.errors import BackendError, DyncompError, ModelError, RequestError
from dyncomp.hardware import default_threads

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = "lower the model again: dyncomp convert --backend tvm"
_POOLED = 2  # kind of allocator, as relax.VirtualMachine numbers them
_CPU = 1
_MAPPED = 1 << 28
"""Bytes from which parameters stay in their file, mapped into memory: copying them would take longer than all else of opening a model.
Smaller ones are copied, for then they are in large pages, and a step that reads them takes 3 to 5 % less (SmolLM2 in int8; in fp32 the
same)."""


class TvmModel:
    """What :func:`dyncomp.backends.tvm.lower.lower` wrote, ready to run.

    Args:
        directory: holds ``model.so``, ``parameters.bin`` and ``config.json``.
        threads: by default the cores this process may use. TVM has one pool of threads in a process: it is set to this number
            whenever this model runs, at most to the cores there were when the first model was loaded.

    Raises:
        ModelError: the directory has no lowered model, or a damaged one.
        BackendError: the library is for another processor, or cannot be loaded.
        MissingExtraError: TVM is not installed.
    """

    device = "cpu"

    def __init__(self, directory: str | Path, *, threads: int | None = None) -> None:
        self.directory, self.threads = Path(directory), threads or default_threads()
        self.config = read_config(self.directory, SCHEMA, again=_AGAIN, older=_AGAIN)
        require_machine(self.config["machine"])
        ffi = load_runtime()
        try:
            module = ffi.load_module(str(self.directory / LIBRARY))
            if "native" in self.config:
                module.import_module(_load_native(ffi, self.directory / NATIVE))
            self._vm = module["vm_load_executable"]()
            self._vm["vm_initialization"](_CPU, 0, _POOLED, _CPU, 0, _POOLED)
            self._main = self._vm["main"]
        except DyncompError:
            raise
        except Exception as error:
            raise BackendError(f"TVM cannot load {self.directory / LIBRARY}: {first_line(error)}", hint=_AGAIN) from error
        self._set_threads = ffi.get_global_func("runtime.config_threadpool")
        self._from_dlpack = ffi.from_dlpack
        self._memory = _read_parameters(self.directory / PARAMETERS)
        self._parameters = [self._from_dlpack(_view(self._memory, p, self.directory)) for p in self.config["parameters"]]
        self.inputs: tuple[str, ...] = tuple(i["name"] for i in self.config["inputs"])
        self.outputs: tuple[str, ...] = tuple(self.config["outputs"])
        self.encoder: TvmModel | None = None
        """What runs once before this model, the decoder of an encoder–decoder; its outputs are inputs of this one."""
        if "encoder" in self.config:
            self.encoder = TvmModel(self.directory / self.config["encoder"], threads=threads)

    @property
    def kv_cache(self) -> dict[str, Any] | None:
        """Layout of the KV cache (``context_length``, ``layers`` …), or None when the model has none."""
        return self.config.get("kv_cache")

    @property
    def precision(self) -> str:
        """``fp32``, ``int8`` or ``int4``: of the weights."""
        return str(self.config.get("precision", "fp32"))

    def run(self, **inputs: Array | Tensor) -> dict[str, Array]:
        """All outputs by name; the inputs are left as they are.

        Raises:
            RequestError: an input is missing, unknown, or has the wrong rank or dtype.
        """
        if set(inputs) != set(self.inputs):
            raise RequestError(f"the model takes the inputs {list(self.inputs)}, got {sorted(inputs)}")
        arrays = [aligned_copy(as_array(inputs[s["name"]], s)) for s in self.config["inputs"]]
        found = self.call([self.bind(a) for a in arrays])
        return {name: np.array(np.from_dlpack(value)) for name, value in zip(self.outputs, found, strict=True)}

    def bind(self, array: Array) -> Any:
        """An array as TVM takes it, sharing its memory: it must be contiguous and begin at a multiple of 64 bytes."""
        if array.ctypes.data % ALIGNMENT or not array.flags.c_contiguous:
            raise RequestError(f"TVM needs contiguous arrays that begin at a multiple of {ALIGNMENT} bytes", hint="copy it: aligned_copy()")
        return self._from_dlpack(array)

    def call(self, inputs: list[Any]) -> list[Any]:
        """Run on bound inputs, in order; caches are changed in place. The outputs are TVM's tensors."""
        use_threads(self._set_threads, self.threads)
        try:
            found = self._main(*inputs, *self._parameters)
        except Exception as error:
            raise BackendError(f"TVM failed: {first_line(error)}") from error
        return list(found) if len(self.outputs) > 1 or isinstance(found, list | tuple) or hasattr(found, "__len__") else [found]

    def placement(self) -> dict[str, dict[str, int]]:
        """Processor -> compiled function -> how often a run calls it: our kernels by name, the rest as TVM named them; an encoder's
        included."""
        found = self.encoder.placement() if self.encoder is not None else {}
        known = found.setdefault(Machine(**self.config["machine"]).title, {})
        for name, count in self.config["kernels"].items():
            known[name] = known.get(name, 0) + count
        return found


@functools.cache
def load_runtime() -> Any:
    """``tvm_ffi`` with TVM's runtime library loaded; ``import tvm``, which takes seconds, is not needed.

    The number of threads TVM starts is fixed when it first computes: every core of this process, unless ``TVM_NUM_THREADS`` says
    otherwise; each model then uses at most that many.
    """
    require_runtime()
    os.environ.setdefault("TVM_NUM_THREADS", str(default_threads()))
    tvm_ffi = _import_ffi()
    found = importlib.util.find_spec("tvm")
    assert found is not None
    assert found.origin is not None
    library = Path(found.origin).parent / "lib" / "libtvm_runtime.so"
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(f"TVM's runtime cannot be loaded: {first_line(error)}") from error
    return tvm_ffi


def _import_ffi() -> Any:
    """``tvm_ffi``, which imports PyTorch where it is installed (seconds), in a process that works without it: as if it were not installed.
    What that costs is its short cut for PyTorch's tensors, which are not given to it here."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]  # an import then raises ImportError
    try:
        import tvm_ffi
    finally:
        if hidden:
            del sys.modules["torch"]
    return tvm_ffi


def _load_native(ffi: Any, path: Path) -> Any:
    """The artifact's own native operators, as a module.

    Raises:
        ModelError: they are missing.
        BackendError: they cannot be loaded here, or DYNCOMP_NATIVE_ISA asks for kernels that this processor does not have.
    """
    if not path.is_file():
        raise ModelError(f"the native operators of a lowered model are missing: {path}", hint=_AGAIN)
    try:
        found, module = instruction_set(path), ffi.load_module(str(path))
    except Exception as error:
        raise BackendError(f"the native operators cannot be loaded: {first_line(error)}", hint=_AGAIN) from error
    if not found:
        raise BackendError(
            f"DYNCOMP_NATIVE_ISA asks for {os.environ.get('DYNCOMP_NATIVE_ISA')!r}, which this processor does not have",
            hint="unset it, or set it to portable",
        )
    return module


_threads: list[int] = []


def use_threads(configure: Any, threads: int) -> None:
    """TVM's pool is the process's: set it when another model used another number."""
    if _threads != [threads]:
        configure(1, threads)
        _threads[:] = [threads]


def aligned_zeros(shape: list[int] | tuple[int, ...], dtype: Any) -> Array:
    """Zeros that begin at a multiple of :data:`~dyncomp.backends.tvm.layout.ALIGNMENT` bytes."""
    count, size = int(np.prod(shape, dtype=np.int64)), np.dtype(dtype).itemsize
    memory = np.zeros(max(count, 1) * size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    held = memory[start : start + max(count, 1) * size].view(dtype)
    return held[:count].reshape(shape)  # an empty slice that did not begin at 0 would point to the unaligned memory


def aligned_copy(array: Array) -> Array:
    """A contiguous copy that TVM can read: one that begins elsewhere would crash it."""
    copy = aligned_zeros(array.shape, array.dtype)
    copy[...] = array
    return copy


def _read_parameters(path: Path) -> Array:
    """The bytes of a file, beginning at a multiple of 64; written to, they are this process's own."""
    try:
        size = path.stat().st_size
        if size > _MAPPED:
            return np.memmap(path, np.uint8, mode="c").view(np.ndarray)
        memory = aligned_zeros([size], np.uint8)
        with path.open("rb") as file:
            file.readinto(memory.data)
    except OSError as error:
        raise ModelError(f"the parameters of a lowered model cannot be read: {error}", hint=_AGAIN) from error
    return memory


def _view(memory: Array, entry: dict[str, Any], directory: Path) -> Array:
    dtype = np.dtype(entry["dtype"])
    size = int(np.prod(entry["shape"], dtype=np.int64)) * dtype.itemsize
    if entry["offset"] + size > memory.nbytes:
        raise ModelError(f"{directory / PARAMETERS} is too short", hint=_AGAIN)
    return memory[entry["offset"] : entry["offset"] + size].view(dtype).reshape(entry["shape"])
