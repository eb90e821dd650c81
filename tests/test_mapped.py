"""Models that memory does not hold: weights in mapped files, the same results."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import pytest
import torch
from dyncomp.passes import gptq as gptq_module
from dyncomp.passes.gptq import gptq
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_checkpoint import write_checkpoint, write_text

from bench.tiny import trace_tiny
from dyncomp import convert as convert_module
from dyncomp import mapped, quantized, sweep
from dyncomp.convert import ConvertRequest, convert
from dyncomp.errors import ModelError, RequestError
from dyncomp.mapped import TensorStore, is_mapped, read_tensors, release, save_tensors
from dyncomp.models import load_model
from dyncomp.quantized import Quantized, decode, round_to_nearest
from dyncomp.serialize import load_graph, save_graph
from dyncomp.sweep import Sweep

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors go into files too, every operation gives their pages back, and every piece of a sweep is as small as can be."""
    monkeypatch.setattr(mapped, "SMALLEST", 1)
    monkeypatch.setattr(mapped, "RESIDENT", 0)
    monkeypatch.setattr(sweep, "PIECE", 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(DTYPES), st.randoms(use_true_random=False))
def test_a_stored_tensor_is_the_same_and_its_file_ends_with_it(tmp_path_factory, shape, dtype, pick) -> None:
    value = torch.randn(shape).mul(50).to(dtype).permute(pick.sample(range(len(shape)), len(shape)))
    before, smallest = set(mapped._mapped), mapped.SMALLEST
    mapped.SMALLEST = 1
    try:
        stored = TensorStore(tmp_path_factory.getbasetemp()).put(value)
        again = TensorStore(tmp_path_factory.getbasetemp()).put(value, torch.float32)
    finally:
        mapped.SMALLEST = smallest
    release()
    assert torch.equal(stored, value)
    assert torch.equal(again, value.float())
    assert all(i == j for size, i, j in zip(value.shape, stored.stride(), value.stride(), strict=True) if size > 1)
    assert is_mapped(stored[..., :1])
    assert not is_mapped(value)
    part = stored[0]
    del stored, again
    assert torch.equal(part, value[0]), "a view keeps the file"
    del part
    gc.collect()
    assert set(mapped._mapped) == before


def test_safetensors_files_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(3, i + 1).mul(9).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 3).t()}
    save_tensors(tensors, tmp_path / "ours")
    save_file({name: t.contiguous() for name, t in tensors.items()}, str(tmp_path / "theirs"))
    for found in (load_file(tmp_path / "ours"), read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("symmetric", [True, False])
def test_large_weights_are_quantized_in_parts(symmetric: bool, monkeypatch) -> None:
    weight, x = torch.randn(2, 9, 64), torch.randn(100, 64)
    gram = x.T @ x

    def both() -> list[Quantized]:
        return [round_to_nearest(weight, 4, 32, symmetric=symmetric), gptq(weight[0], gram, 4, 32, symmetric=symmetric)]

    whole = both()
    monkeypatch.setattr(quantized, "_PART", 200)
    monkeypatch.setattr(gptq_module, "_VALUES", 200)
    for before, after in zip(whole, both(), strict=True):
        assert torch.equal(after.codes, before.codes)
        assert torch.equal(after.scales, before.scales)
        assert (after.offsets is None) is symmetric
        assert torch.equal(after.decode(), decode(before.codes.unflatten(-1, (-1, 32)), before.scales, before.offsets, 4).flatten(-2))


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_a_sweep_in_pieces_gives_the_same(everything, name: str, tmp_path: Path) -> None:
    graph = trace_tiny(name)
    data = [{spec.name: torch.full((2, 5), i + 1) for spec in graph.inputs} for i in range(3)]
    expected = Sweep(graph, data).advance(graph.output_nodes[0])
    stored = graph.copy()
    stored.keep_in(TensorStore(tmp_path))
    save_graph(graph, tmp_path / "graph.json", tmp_path / "weights.safetensors")
    read = load_graph(tmp_path / "graph.json", tmp_path / "weights.safetensors", store=TensorStore(tmp_path))
    for low in (stored, read):
        assert all(is_mapped(t) for t in low.constants().values())
        first = Sweep(low, data)
        pieces = first._pieces(first._segment(low.output_nodes[0]))
        assert 2 < len(pieces) < 20
        assert [n for piece in pieces for n in piece] == Sweep(low, data)._segment(low.output_nodes[0])
        for found in (Sweep(low, data).advance(low.output_nodes[0]), Sweep(low, data).each(low.output_nodes[0]), [low(**b) for b in data]):
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tmp_path_factory.mktemp("low") / "model")
    AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16).save_pretrained(folder)
    write_text(folder / "text.txt")
    return folder


def test_a_checkpoint_is_read_into_files_as_into_memory(everything, model: Path, tmp_path: Path) -> None:
    whole, low = load_model(str(model)), load_model(str(model), store=TensorStore(tmp_path))
    assert low.fingerprint == whole.fingerprint
    assert {p.dtype for p in low.module.parameters()} == {torch.float32}
    assert all(is_mapped(p) for p in low.module.parameters())
    assert low.module.model.lm_head.weight is low.module.model.model.embed_tokens.weight


@pytest.mark.parametrize("options", [{"active": 0.75, "experts": 4}, {"recipe": "dense", "quantize": "int4"}], ids=["experts", "int4"])
def test_low_memory_converts_to_the_same_bits(everything, options, model: Path, tmp_path: Path) -> None:
    found = []
    for low in (False, True):
        out = tmp_path / f"low-{low}"
        report = convert(
            ConvertRequest(
                model=str(model), out=out, calibrate=str(model / "text.txt"), other=None, tokens=1024, windows=2, backend="torch",
                low_memory=low, **options,
            )
        )  # fmt: skip
        found.append(((out / "weights.safetensors").read_bytes(), (out / "graph.json").read_text(), json.dumps(report["quality"])))
    assert found[0] == found[1]


def test_models_that_would_not_fit_are_kept_in_files_and_lowering_them_is_refused(model: Path, tmp_path: Path, monkeypatch) -> None:
    request = ConvertRequest(model=str(model), out=tmp_path / "out", recipe="experts", calibrate=str(model / "text.txt"))
    assert convert_module._store(request) is None
    with pytest.raises(ModelError, match=r"has no config\.json"):
        convert_module._store(ConvertRequest(model=str(tmp_path), out=tmp_path / "out", recipe="experts"))
    monkeypatch.setattr(convert_module, "available_memory", lambda: 100_000)
    store = convert_module._store(request)
    assert store is not None
    assert store.folder == tmp_path
    with pytest.raises(RequestError, match=r"--backend ort: lowering .* available(.|\n)*--backend torch"):
        convert(request)
    assert not list(tmp_path.iterdir())
