"""A DINOv2 vision transformer out of an ONNX file that torch.onnx wrote of it, with whatever head the file has left aside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dyncomp.errors import ModelError
from dyncomp.models.extras import quiet, require
from dyncomp.models.huggingface import from_pretrained
from dyncomp.models.loaded import LoadedModel, first_line
from dyncomp.models.wrap import wrap

_ROOT = "backbone"  # the module of the vision transformer; names in the file begin with it
_HEAD = 64  # features of an attention head, in DINOv2 of every size (2304.07193, table 17)


def load_dinov2_onnx(path: Path, *, name: str, dtype: torch.dtype = torch.float32, kind: str = "onnx") -> LoadedModel:
    """Rebuild ``Dinov2Model`` from the initializers of an ONNX file.

    Images are prepared as DINOv2's are (its processor in transformers), at the size that the file's input has.

    Raises:
        ModelError: the file is damaged, or holds no such model.
        MissingExtraError: onnx, transformers or pillow is not installed.
    """
    require("onnx", needed_for=f"reading {name!r}", extra="ort")
    require("transformers", needed_for=f"building {name!r}")
    require("PIL", needed_for="preparing images")
    import onnx
    from transformers import Dinov2Config, Dinov2Model

    try:
        graph = onnx.load(str(path)).graph
        state, size = _state(graph), graph.input[0].type.tensor_type.shape.dim[2].dim_value
        width, channels, patch = (state["embeddings.patch_embeddings.projection.weight"].shape[i] for i in (0, 1, 2))
        side = math.isqrt(state["embeddings.position_embeddings"].shape[1] - 1)
        config = Dinov2Config(
            hidden_size=width, num_channels=channels, patch_size=patch, image_size=side * patch, num_attention_heads=width // _HEAD,
            num_hidden_layers=1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layer.")),
            mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width, use_mask_token=False,
        )  # fmt: skip
    except Exception as error:  # protobuf has errors of its own
        raise ModelError(f"{path} holds no DINOv2: {first_line(error)}", hint="install the package again") from error
    model = from_pretrained(Dinov2Model, None, name=name, dtype=dtype, config=config, state_dict=state)
    return wrap(model, name=name, kind=kind, tokenizer=None, processor=_processor(size), causal=False)


def _state(graph: Any) -> dict[str, Tensor]:
    """Weights by their names in the module. torch.onnx keeps the names of most; matrices it transposes, and the positions, which it splits
    into the class token's and the patches', are known by the path of the node that reads them."""
    from onnx import numpy_helper

    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix(f"{_ROOT}."): value for name, value in held.items() if name.startswith(f"{_ROOT}.")}
    positions: list[Tensor] = []
    for node in graph.node:
        module = node.name.rpartition("/")[0].removeprefix(f"/{_ROOT}/").replace("/", ".")
        unnamed = [held[i] for i in node.input if i.startswith("onnx::") and i in held]
        if node.op_type == "MatMul" and unnamed:
            state[f"{module}.weight"] = unnamed[0].T.contiguous()
        elif module == "embeddings":
            positions += unnamed
    state["embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda p: p.shape[1]), 1)  # the class token's first
    return state


def _processor(size: int) -> Any:
    with quiet():
        from transformers import BitImageProcessor
        from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        return BitImageProcessor(
            do_resize=True, size={"shortest_edge": round(size * 256 / 224)}, resample=3, do_center_crop=True,
            crop_size={"height": size, "width": size}, do_rescale=True, do_normalize=True, do_convert_rgb=True,
            image_mean=list(IMAGENET_DEFAULT_MEAN), image_std=list(IMAGENET_DEFAULT_STD),
        )  # fmt: skip
