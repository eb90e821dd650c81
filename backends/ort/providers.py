"""Execution providers: which there are, and what brings the ones there are not."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from dyncomp.errors import MissingExtraError, ProviderError

CPU = "CPUExecutionProvider"

# short name -> (ONNX Runtime's name, the package that brings it)
PROVIDERS = {
    "cpu": (CPU, "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "directml": ("DmlExecutionProvider", "onnxruntime-directml"),
    "qnn": ("QNNExecutionProvider", "onnxruntime-qnn"),
    "coreml": ("CoreMLExecutionProvider", "onnxruntime"),
    "webgpu": ("WebGpuExecutionProvider", "onnxruntime-webgpu"),
}


DEVICES = {"cpu": ("cpu",), "cuda": ("cuda",), "tensorrt": ("tensorrt", "cuda")}
"""What ``--device`` may be -> providers, best first: TensorRT leaves to CUDA's what it does not know."""


def usable_devices() -> list[str]:
    """Those of :data:`DEVICES` whose providers the installed ONNX Runtime has."""
    found = []
    for device, names in DEVICES.items():
        with contextlib.suppress(ProviderError):
            require_providers(names)
            found.append(device)
    return found


def require_providers(names: Sequence[str] | None) -> list[str]:
    """ONNX Runtime's names of the given providers (short or full), the CPU last; it takes what the others do not.

    Raises:
        ProviderError: one is unknown, or not in the installed ONNX Runtime; the hint is the command that brings it.
        MissingExtraError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", needed_for="the ONNX Runtime backend", extra="ort") from error
    available = onnxruntime.get_available_providers()
    full = dict(PROVIDERS.values())
    chosen = []
    for name in names or ["cpu"]:
        provider = PROVIDERS[name.lower()][0] if name.lower() in PROVIDERS else name
        if provider not in full and provider not in available:
            raise ProviderError(f"there is no execution provider {name!r}", hint="known are " + ", ".join(PROVIDERS))
        if provider not in available:
            raise ProviderError(
                f"the installed onnxruntime {onnxruntime.__version__} has no {provider} (it has {', '.join(available)})",
                hint=f"pip install {full[provider]}",
            )
        chosen.append(provider)
    return [p for p in dict.fromkeys(chosen) if p != CPU] + [CPU]
