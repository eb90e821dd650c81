"""How close the exported graph comes to one written by hand.

Builds SmolLM2-135M operator by operator, as onnxruntime-genai's model builder does: packed QKV, GroupQueryAttention with the rotary
embedding inside, SkipSimplifiedLayerNormalization, the head for the last token only. Then measures both in turns:

    python bench/hand_gqa.py [--threads 2] [--pin]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from dyncomp.backends.ort.decoder import OrtDecoder
from dyncomp.backends.ort.lower import CONFIG, MODEL, lower
from dyncomp.backends.ort.run import OrtModel
from dyncomp.passes.add_kv_cache import AddKVCache
from onnx import TensorProto, helper, numpy_helper

from dyncomp.models import load_model
from dyncomp.pipeline import Context
from dyncomp.runtime.bench import Variant, bench
from dyncomp.trace import trace

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 30, 9, 3, 64, 576, 49152
CACHES = [f"{kind}_cache_{i}" for i in range(LAYERS) for kind in ("key", "value")]


def build(weights: dict[str, np.ndarray], tables: tuple[np.ndarray, np.ndarray], directory: Path, config: str) -> None:
    """Write the hand-built model; inputs and outputs as the exported one has them."""
    nodes: list[onnx.NodeProto] = []
    constants = {"cos": tables[0], "sin": tables[1], "one": np.array([1], np.int64)}

    def node(op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, outputs, name=f"n{len(nodes)}", domain=domain, **attributes))
        return outputs[0]

    def matmul(x: str, name: str, weight: np.ndarray) -> str:
        constants[name] = np.ascontiguousarray(weight.T)
        return node("MatMul", [x, name], [f"{name}_out"])

    constants["embedding"] = weights["model.embed_tokens.weight"]
    x = node("Gather", ["embedding", "input_ids"], ["embedded"])
    node("Shape", ["input_ids"], ["length"], start=1, end=2)
    node("Add", ["past_length", "length"], ["after"])
    node("Cast", [node("Sub", ["after", "one"], ["before"])], ["lengths"], to=TensorProto.INT32)
    node("Cast", [node("ReduceMax", ["after"], ["most"], keepdims=0)], ["total"], to=TensorProto.INT32)
    constants["norm_first"] = weights["model.layers.0.input_layernorm.weight"]
    h = node("SimplifiedLayerNormalization", [x, "norm_first"], ["normed_first"], axis=-1, epsilon=1e-5, stash_type=1)
    for i in range(LAYERS):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if k.startswith(f"model.layers.{i}.")}
        qkv = matmul(h, f"qkv_{i}", np.concatenate([layer[f"self_attn.{p}_proj.weight"] for p in "qkv"]))
        attended = node(
            "GroupQueryAttention",
            [qkv, "", "", f"key_cache_{i}", f"value_cache_{i}", "lengths", "total", "cos", "sin"],
            [f"attended_{i}", f"new_key_cache_{i}", f"new_value_cache_{i}"],
            "com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1, rotary_interleaved=0, scale=HEAD_DIM**-0.5,
        )  # fmt: skip
        out = matmul(attended, f"o_{i}", layer["self_attn.o_proj.weight"])
        constants[f"norm_post_{i}"] = layer["post_attention_layernorm.weight"]
        h = node("SkipSimplifiedLayerNormalization", [x, out, f"norm_post_{i}"], [f"normed_post_{i}", "", "", f"sum_post_{i}"],
                 "com.microsoft", epsilon=1e-5)  # fmt: skip
        gate, up = (matmul(h, f"{p}_{i}", layer[f"mlp.{p}_proj.weight"]) for p in ("gate", "up"))
        silu = node("Mul", [gate, node("Sigmoid", [gate], [f"sigmoid_{i}"])], [f"silu_{i}"])
        down = matmul(node("Mul", [silu, up], [f"hidden_{i}"]), f"down_{i}", layer["mlp.down_proj.weight"])
        following = f"model.layers.{i + 1}.input_layernorm.weight" if i + 1 < LAYERS else "model.norm.weight"
        constants[f"norm_{i}"] = weights[following]
        x = f"sum_{i}"
        h = node("SkipSimplifiedLayerNormalization", [f"sum_post_{i}", down, f"norm_{i}"], [f"normed_{i}", "", "", x],
                 "com.microsoft", epsilon=1e-5)  # fmt: skip
    constants["axes"] = np.array([2], np.int64)
    constants["expand"] = np.array([1, 1, WIDTH], np.int64)
    index = node("Expand", [node("Unsqueeze", ["chosen", "axes"], ["index"]), "expand"], ["indices"])
    matmul(node("GatherElements", [h, index], ["hidden_chosen"], axis=1), "head", weights["model.embed_tokens.weight"])
    nodes[-1].output[0] = "logits"

    def value(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    cache: list[int | str] = ["batch", KV_HEADS, "capacity", HEAD_DIM]
    inputs = [value("input_ids", TensorProto.INT64, ["batch", "sequence"]), value("past_length", TensorProto.INT64, ["batch"]),
              value("chosen", TensorProto.INT64, ["batch", "chosen"]), *(value(n, TensorProto.FLOAT, cache) for n in CACHES)]  # fmt: skip
    outputs = [
        value("logits", TensorProto.FLOAT, ["batch", "chosen", VOCABULARY]),
        *(value(f"new_{n}", TensorProto.FLOAT, cache) for n in CACHES),
    ]
    graph = helper.make_graph(nodes, "hand", inputs, outputs, [numpy_helper.from_array(v, k) for k, v in constants.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)], ir_version=10)
    directory.mkdir(parents=True, exist_ok=True)
    onnx.save(model, directory / MODEL, save_as_external_data=True, location=f"{MODEL}.data")
    (directory / CONFIG).write_text(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pin", action="store_true", help="bind threads to cores")
    parser.add_argument("--decode", type=int, default=256, help="steps counted")
    parser.add_argument("--keep", type=Path, help="folder to keep (or find) both models in")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        if not (folder / "hand" / MODEL).exists():
            prepare(folder)
        ours, hand = (OrtModel(folder / name, threads=arguments.threads, pin=arguments.pin) for name in ("exported", "hand"))
        ids, one = np.arange(24).reshape(2, 12), np.array([12, 7])
        a, b = (OrtDecoder(m).prefill(ids, one, 4) for m in (ours, hand))
        print(f"largest difference of logits: {abs(a - b).max() / abs(b).max():.1e} (relative)")
        results = bench([Variant(OrtDecoder(ours), "exported"), Variant(OrtDecoder(hand), "hand-built")], decode_tokens=arguments.decode)
        print(json.dumps(results, indent=1))
        for key in ("decode_tokens_per_s", "prefill_tokens_per_s"):
            print(f"{key}: exported / hand-built = {results[0][key] / results[1][key]:.3f}")


def prepare(folder: Path) -> None:
    loaded = load_model("smollm2-135m")
    graph = trace(loaded.module, loaded.example_inputs, loaded.dynamic_dims, output_name=loaded.output_name,
                  info={"name": loaded.name, "context_length": loaded.context_length})  # fmt: skip
    AddKVCache(logits="chosen").run(graph, Context())
    lower(graph, folder / "exported")
    weights = {k.removeprefix("model."): v.numpy() for k, v in loaded.module.state_dict().items()}  # the wrapper adds a "model."
    tables = tuple(graph.tensor(f"tables.rotary_{name}_0").numpy() for name in ("cos", "sin"))
    build(weights, (tables[0], tables[1]), folder / "hand", (folder / "exported" / CONFIG).read_text())


if __name__ == "__main__":
    main()
