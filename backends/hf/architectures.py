"""The stock architectures of transformers that a decoder can be written as, what each lacks, and what each calls its tensors.

Where a model's gates are what the architecture makes of scores (``fit-router{temper=}``, ``upcycle``, mixtures that were trained), its
routers are written as they are. Gates of exactly 1 no stock class has: its weights are a softmax or a sigmoid of scores. A *tempered*
router comes near them: with ``W' = 2^-p W``, which is exact in floating point and keeps the order of the experts, all scores are near
0, the weights are nearly equal, and a fixed factor brings them to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dyncomp.backends.hf.shape import Routing, Shape

from dyncomp.regions.weighting import Weighting

ACTIVATIONS = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "quick_gelu": "quick_gelu", "relu2": "relu2",
    "sigmoid": "sigmoid", "tanh": "tanh", "mish": "mish",
}  # fmt: skip
"""dyncomp's name -> transformers'."""

ALIGNED = 8
"""Neurons whose weights are 16 bytes in bfloat16: torch's grouped products want rows of that size."""

TOPK = "convert with --recipe granite-moe or qwen-moe: the same number of experts for every token, no biases"


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: as on the command line. model_type: as in ``config.json``.
        routed: its FFNs are mixtures of experts.
        router, experts, shared: names below a layer; ``shared`` is (gate, up, down), or (both, down), or () when it has none.
        router_bias: name of the bias of its scores, or None.
        dense: which layers may be left without experts: ``none``, ``first`` or ``any``.
        qkv_bias, out_bias: ``no``, ``may`` or (qkv only) ``must`` have one; ``always``: it has, zeros where the
            model has none (a class may read them whatever the configuration says: vLLM's Qwen2Moe). ffn_bias: the FFN's three linear
            layers may have biases.
        head_norm: whether queries and keys are normalised: ``no``, ``may``, ``must``.
        free_scale: the factor on the scores can be chosen. partial_rotary: a part of each head can be left unrotated.
        always_shared: it has at least one shared expert: one of zeros where the model has none.
        shared_factor: what shared experts' outputs are multiplied with to undo what the architecture does to them.
        scaled: the routed experts' outputs are scaled by a field of the configuration, not in the weights.
        function: ``softmax`` or ``sigmoid``, what makes weights of scores. unnormalised: these need not be divided by the sum of those of
            the experts that run. groups: experts can be chosen in the best groups of them.
        temper: p that suits gates of 1. Where experts are chosen by their scores any p keeps their order. Where they are chosen by
            probability, float32 tells two apart only when their scores differ by about 2^(p - 23); a small p makes weights unequal by
            about 2^-p, and that moves the scores of the layers after it: 12 is between the two, and neither is small in a model of many
            layers. Granite's class in transformers chooses by scores, and any p up to 24 does; other programs may choose by probability
            there too, hence 14.
        extra: its own fields of ``config.json``.
    """

    name: str
    model_type: str
    extra: Callable[[Shape], dict[str, Any]]
    routed: bool = True
    router: str = "mlp.gate.weight"
    experts: str = "mlp.experts"
    shared: tuple[str, ...] = ()
    router_bias: str | None = None
    dense: str = "none"
    qkv_bias: str = "may"
    out_bias: str = "no"
    ffn_bias: bool = False
    head_norm: str = "no"
    free_scale: bool = False
    partial_rotary: bool = False
    always_shared: bool = False
    shared_factor: float = 1.0
    scaled: bool = False
    function: str = "softmax"
    unnormalised: bool = False
    groups: bool = False
    temper: int = 12

    def reasons(self, shape: Shape) -> list[str]:
        """Why it cannot hold a decoder of this shape; nothing when it can."""
        found = [*self._attention(shape), *(self._routed(shape, shape.routing) if shape.routing else self._unrouted(shape))]
        if shape.activation not in ACTIVATIONS:
            found.append(f"transformers has no activation like {shape.activation}")
        if shape.ffn_bias and not self.ffn_bias:
            remedy = " (refit-down{bias=false})" if shape.routing else ""
            found.append(f"its FFNs have no biases, the model's have{remedy}")
        return found

    def _attention(self, shape: Shape) -> list[str]:
        found = []
        if shape.qkv_bias and self.qkv_bias == "no":
            found.append("its queries, keys and values have no biases, the model's have")
        if not shape.qkv_bias and self.qkv_bias == "must":
            found.append("its queries, keys and values have biases, the model's have none")
        if shape.out_bias and self.out_bias == "no":
            found.append("its attention's output has no bias, the model's has")
        if shape.head_norm and self.head_norm == "no":
            found.append("it does not normalise queries and keys, the model does")
        if not shape.head_norm and self.head_norm == "must":
            found.append("it normalises queries and keys, the model does not")
        if not self.free_scale and abs(shape.scale * shape.head_dim**0.5 - 1) > 1e-5:
            found.append(f"its scores are scaled by head_dim^-0.5, the model's by {shape.scale:g}")
        if not self.partial_rotary and shape.rotated != shape.head_dim:
            found.append(f"it rotates whole heads, the model {shape.rotated} of {shape.head_dim} features")
        return found

    def _routed(self, shape: Shape, routing: Routing) -> list[str]:
        if not self.routed:
            return ["it has no experts, the model has"]
        found = []
        if routing.bias and self.router_bias is None:
            found.append("its router has no bias, the model's has (fit-router{bias=false})")
        if routing.shared and not self.shared:
            found.append("it has no shared experts, the model has (carve-experts{shared=0})")
        if routing.width % ALIGNED:
            found.append(f"experts of {routing.width} neurons: transformers' kernels take multiples of {ALIGNED} (fewer experts)")
        found += self._weighted(routing.weighting)
        first = shape.dense == tuple(range(len(shape.dense)))
        if shape.dense and (self.dense == "none" or (self.dense == "first" and not first)):
            layers = ", ".join(map(str, shape.dense[:4]))
            where = "every layer has experts" if self.dense == "none" else "only its first layers can be without experts"
            found.append(f"{where}, the model's layers {layers} have none (carve-experts{{keep-dense=}})")
        return found

    def _weighted(self, weighting: Weighting) -> list[str]:
        found = []
        if not weighting.equal and (weighting.function != self.function or not (weighting.normalised or self.unnormalised)):
            found.append(f"its gates are {Weighting(self.function, slope=1)}, the model's {weighting}")
        if weighting.equal and weighting.function == "sigmoid":
            found.append("its gates are what experts are chosen by, the model's are 1 for all that sigmoids choose by groups or bias")
        if weighting.groups > 1 and not self.groups:
            found.append(
                f"it chooses among all experts, the model in {weighting.kept} of {weighting.groups} groups (fit-router{{gates=topk}})"
            )
        return found

    def _unrouted(self, shape: Shape) -> list[str]:
        return ["every layer has experts, the model has none"] if self.routed else []

    def gain(self, shape: Shape) -> float:
        """What the routed experts' output weights are multiplied with, so that gates sum to what they do in the model."""
        return 1.0 if self.scaled or shape.routing is None else shape.routing.weighting.total


def _granite(shape: Shape) -> dict[str, Any]:
    routing = _need(shape)
    return {
        "intermediate_size": routing.width, "shared_intermediate_size": routing.shared, "num_local_experts": routing.experts,
        "num_experts_per_tok": routing.k, "attention_multiplier": shape.scale, "attention_bias": shape.qkv_bias or shape.out_bias,
    }  # fmt: skip


def _glm4(shape: Shape) -> dict[str, Any]:
    routing = _need(shape)
    return {
        "intermediate_size": shape.dense_width or routing.width, "moe_intermediate_size": routing.width,
        "n_shared_experts": max(1, routing.shared // routing.width), "n_routed_experts": routing.experts, "num_experts_per_tok": routing.k,
        "routed_scaling_factor": float(routing.weighting.total), "norm_topk_prob": routing.weighting.normalised,
        "n_group": routing.weighting.groups, "topk_group": routing.weighting.kept,
        "first_k_dense_replace": len(shape.dense), "use_qk_norm": shape.head_norm, "attention_bias": shape.qkv_bias,
        "partial_rotary_factor": shape.rotated / shape.head_dim, "num_nextn_predict_layers": 0,
    }  # fmt: skip


def _qwen2_moe(shape: Shape) -> dict[str, Any]:
    routing = _need(shape)
    return {
        "intermediate_size": shape.dense_width or routing.width, "moe_intermediate_size": routing.width,
        "shared_expert_intermediate_size": routing.shared, "num_experts": routing.experts, "num_experts_per_tok": routing.k,
        "norm_topk_prob": routing.weighting.normalised, "mlp_only_layers": list(shape.dense), "qkv_bias": True,
    }  # fmt: skip


def _qwen3_moe(shape: Shape) -> dict[str, Any]:
    routing = _need(shape)
    return {
        "intermediate_size": shape.dense_width or routing.width, "moe_intermediate_size": routing.width, "num_experts": routing.experts,
        "num_experts_per_tok": routing.k, "norm_topk_prob": routing.weighting.normalised, "mlp_only_layers": list(shape.dense),
        "attention_bias": shape.qkv_bias,
    }  # fmt: skip


def _mixtral(shape: Shape) -> dict[str, Any]:
    routing = _need(shape)
    return {
        "intermediate_size": routing.width, "num_local_experts": routing.experts, "num_experts_per_tok": routing.k, "sliding_window": None
    }  # fmt: skip


def _dense(shape: Shape) -> dict[str, Any]:
    return {"intermediate_size": shape.dense_width}


def _llama(shape: Shape) -> dict[str, Any]:
    return _dense(shape) | {"attention_bias": shape.qkv_bias or shape.out_bias, "mlp_bias": shape.ffn_bias}


def _qwen3(shape: Shape) -> dict[str, Any]:
    return _dense(shape) | {"attention_bias": shape.qkv_bias}


def _need(shape: Shape) -> Routing:
    assert shape.routing is not None
    return shape.routing


ARCHITECTURES = {
    item.name: item
    for item in (
        Architecture(
            "granite-moe", "granitemoeshared", _granite, router="block_sparse_moe.router.weight", experts="block_sparse_moe.experts",
            shared=("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"), out_bias="may", free_scale=True,
            temper=14,
        ),
        Architecture(
            "glm4-moe", "glm4_moe", _glm4, router_bias="mlp.gate.e_score_correction_bias", dense="first", head_norm="may",
            function="sigmoid", unnormalised=True, groups=True, always_shared=True,
            shared=tuple(f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")), partial_rotary=True, scaled=True,
        ),
        Architecture(
            "qwen2-moe", "qwen2_moe", _qwen2_moe, qkv_bias="always", dense="any", shared_factor=2.0, unnormalised=True,
            shared=tuple(f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")),
        ),
        Architecture("qwen3-moe", "qwen3_moe", _qwen3_moe, dense="any", out_bias="may", head_norm="must", unnormalised=True),
        Architecture("mixtral", "mixtral", _mixtral, qkv_bias="no"),
        Architecture("qwen2", "qwen2", _dense, routed=False, qkv_bias="must"),
        Architecture("qwen3", "qwen3", _qwen3, routed=False, out_bias="may", head_norm="must"),
        Architecture("llama", "llama", _llama, routed=False, out_bias="may", ffn_bias=True),
    )
}  # fmt: skip
"""In the order in which ``auto`` tries them. Sources: the classes of transformers 5."""
