"""Graphs and bundles on disk: what is written is what is read, and damage is named."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from dyncomp.passes import CarveExperts
from helpers import assert_close

from bench.tiny import ARCHITECTURES, built, sample, trace_tiny
from dyncomp import bundle
from dyncomp.bundle import Manifest, Source, open_bundle
from dyncomp.errors import BundleError, DyncompError, RequestError
from dyncomp.pipeline import Context, Pipeline
from dyncomp.serialize import load_graph, save_graph


def save(graph, folder):
    folder.mkdir(exist_ok=True)
    save_graph(graph, folder / "graph.json", folder / "weights.safetensors")
    return folder / "graph.json", folder / "weights.safetensors"


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_graph_comes_back_the_same(name: str, tmp_path) -> None:
    graph = trace_tiny(name)
    if ARCHITECTURES[name].ffns and not ARCHITECTURES[name].shared:
        Pipeline([CarveExperts(experts=4, cluster="random")]).run(graph, Context())
    again = load_graph(*save(graph, tmp_path / "g"))
    _, inputs, dims = built(name)
    fresh = sample(inputs, dims, {"batch": 3, "sequence": 11}, seed=5)
    with torch.no_grad():
        assert_close(again(**fresh), graph(**fresh), rel=1e-6)
    assert again.inputs == graph.inputs
    assert again.outputs == graph.outputs
    assert [n.name for n in again.nodes if n.op == "call_function"] == [n.name for n in graph.nodes if n.op == "call_function"]
    assert again.parameter_count() == graph.parameter_count()


def test_an_operator_outside_the_known_namespaces_is_not_called(tmp_path) -> None:
    file, tensors = save(trace_tiny("llama"), tmp_path / "g")
    document = json.loads(file.read_text())
    call = next(n for n in document["nodes"] if n["op"] == "call_function")
    for target in ("os.system", "python.eval", "aten.no_such_op.default", "builtins.exec"):
        call["target"] = target
        file.write_text(json.dumps(document))
        with pytest.raises(BundleError, match=f"operator '{target}'"):
            load_graph(file, tensors)


def make_bundle(tmp_path):
    """A sealed bundle of a tiny graph."""
    folder, out = tmp_path / "out.part", tmp_path / "out"
    folder.mkdir()
    bundle.save_bundle_files(folder, trace_tiny("llama"), {"schema": 1})
    source = Source(name="llama", kind="factory", task="causal-lm", fingerprint="f", context_length=64, output_name="logits", config={})
    bundle.seal(folder, out, Manifest(source=source, recipe="none", passes=[], refusals=[], versions={}))
    assert not folder.exists()
    return out


def test_a_bundle_opens_and_its_graph_runs(tmp_path) -> None:
    opened = open_bundle(make_bundle(tmp_path))
    ids = torch.randint(2, 90, (2, 6))
    assert torch.equal(opened.graph()(ids), trace_tiny("llama")(ids))
    assert opened.tokenizer() is None
    with pytest.raises(BundleError, match="no artifact for the backend 'ort'"):
        opened.artifact("ort")


@pytest.mark.parametrize("name", ["graph.json", "weights.safetensors", "report.json"])
def test_one_flipped_byte_is_found_and_named(name: str, tmp_path) -> None:
    out = make_bundle(tmp_path)
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        open_bundle(out)


def test_truncated_missing_foreign_and_newer_bundles_are_named(tmp_path) -> None:
    out = make_bundle(tmp_path)
    weights = out / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-7])
    with pytest.raises(BundleError, match="truncated"):
        open_bundle(out)
    weights.unlink()
    with pytest.raises(BundleError, match=r"weights.safetensors is missing"):
        open_bundle(out)
    manifest = out / "dyncomp.json"
    document = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(BundleError, match="newer dyncomp"):
        open_bundle(out)
    for text in ("{", "[]", '{"schema_version": 1}'):
        manifest.write_text(text)
        with pytest.raises(BundleError, match="damaged"):
            open_bundle(out)
    with pytest.raises(BundleError, match="not a dyncomp bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nowhere")


def test_only_an_earlier_bundle_or_an_empty_folder_is_replaced(tmp_path) -> None:
    out = make_bundle(tmp_path)
    bundle.check_destination(out)
    bundle.check_destination(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    bundle.check_destination(tmp_path / "empty")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("years of work")
    for taken, words in (
        (tmp_path / "papers", "not a dyncomp bundle"),
        (out / "graph.json", "is a file"),
        (tmp_path / "a" / "b", "does not exist"),
    ):
        with pytest.raises(RequestError, match=words):
            bundle.check_destination(taken)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_to_be_full(code: int, tmp_path) -> None:
    with pytest.raises(DyncompError, match="the disk is full while writing to") as error, bundle.disk_errors(tmp_path):
        raise OSError(code, "No space left on device")
    assert "continues" in str(error.value)
