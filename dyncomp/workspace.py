"""``OUT.part``: what an interrupted conversion has finished, so that the next run continues there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from dyncomp import __version__
from dyncomp.graph import Graph
from dyncomp.pipeline import PassRecord, PassResult
from dyncomp.regions.refusal import Refusal
from dyncomp.serialize import load_graph, save_graph
from dyncomp.whole import replacing


class Workspace:
    """The folder beside a bundle to be.

    Args:
        out: where the bundle will be.
        request: everything the result depends on; what another request has left is removed.
        data: token windows it depends on too.
    """

    def __init__(self, out: Path, request: list[Any], data: Iterable[Tensor]) -> None:
        self.folder = out.absolute().with_name(out.absolute().name + ".part")
        self.records: list[PassRecord] = []
        digest = hashlib.sha256(json.dumps([__version__, *request]).encode())
        for ids in data:
            digest.update(ids.numpy().tobytes())
        key, file = digest.hexdigest(), self.folder / "request"
        if self.folder.exists() and (not file.is_file() or file.read_text() != key):
            shutil.rmtree(self.folder)
        self.folder.mkdir(exist_ok=True)
        file.write_text(key)

    def keep(self, graph: Graph, done: list[PassRecord]) -> None:
        """Note finished passes and the graph after them."""
        part = self.folder / "graph.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        save_graph(graph, part / "graph.json", part / "weights.safetensors")
        (part / "records.json").write_text(json.dumps([dataclasses.asdict(r) for r in [*self.records, *done]]))
        kept = self.folder / "graph"
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(part, kept)
        self.records += done

    def resume(self, dense: Graph) -> tuple[Graph, list[PassRecord]]:
        """The graph after the last finished pass and the records so far; a copy of the dense graph when there is none."""
        done = self.folder / "graph"
        if not (done / "records.json").is_file():
            return dense.copy(), []
        self.records.clear()
        for item in json.loads((done / "records.json").read_text()):
            result = item.pop("result")
            refused = [Refusal(**r) for r in result["refused"]]
            self.records.append(PassRecord(**item, result=PassResult(result["changed"], refused, result["facts"])))
        return load_graph(done / "graph.json", done / "weights.safetensors", store=dense.store), list(self.records)

    def stage(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value, computed once."""
        file = self.folder / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text())
        value = compute()
        with replacing(file) as part:
            part.write_text(json.dumps(value))
        return value

    def bundle_folder(self) -> Path:
        folder = self.folder / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
