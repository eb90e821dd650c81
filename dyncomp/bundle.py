"""A conversion on disk: one directory, every file checksummed, written whole or not at all, no pickle.

::

    dyncomp.json            schema, source and its fingerprint, recipe, passes, versions, sha256 of every file
    graph.json              the converted graph                      weights.safetensors   its tensors
    tokenizer/ processor/   as transformers saves them               report.json           quality, cost, parity, timings
    artifacts/ort/          what runs: model.onnx + external data
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dyncomp import __version__
from dyncomp.errors import BundleError, DyncompError, ModelError, RequestError
from dyncomp.graph import Graph
from dyncomp.models import LoadedModel, load_model, load_processor, load_tokenizer
from dyncomp.models.loaded import Decoding
from dyncomp.serialize import load_graph, save_graph

SCHEMA = 1
MANIFEST = "dyncomp.json"


class Source(BaseModel):
    """Where the dense model came from."""

    name: str
    kind: str
    task: str
    fingerprint: str
    context_length: int | None
    output_name: str
    config: dict[str, Any]
    decoding: Decoding | None = None  # of an encoder–decoder
    generation: dict[str, Any] = {}  # of a decoder: what its generation_config.json sets


class PassEntry(BaseModel):
    """One pass that ran."""

    spec: str
    seconds: float
    relative_error: float | None
    changed: list[str]
    refused: list[dict[str, str]]
    facts: dict[str, Any]


class FileEntry(BaseModel):
    sha256: str
    bytes: int


class Manifest(BaseModel):
    """``dyncomp.json``."""

    schema_version: int = SCHEMA
    dyncomp: str = __version__
    source: Source
    recipe: str
    passes: list[PassEntry]
    refusals: list[dict[str, str]]
    versions: dict[str, str]
    files: dict[str, FileEntry] = {}


class Bundle:
    """A bundle that was opened with :func:`open_bundle`: manifest read, checksums verified."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    def graph(self) -> Graph:
        """The converted graph."""
        return load_graph(self.path / "graph.json", self.path / "weights.safetensors")

    def report(self) -> dict[str, Any]:
        return json.loads((self.path / "report.json").read_text())

    def artifact(self, backend: str) -> Path:
        """The folder of a backend's artifact.

        Raises:
            BundleError: the bundle has none for this backend.
        """
        folder = self.path / "artifacts" / backend
        if not folder.is_dir():
            raise BundleError(f"{self.path} has no artifact for the backend {backend!r}", hint="convert the model again with that backend")
        return folder

    def dense(self) -> LoadedModel:
        """The dense model this bundle was made from, loaded again from its source.

        Raises:
            BundleError: the source is gone, or holds another model now.
        """
        source = self.manifest.source
        try:
            loaded = load_model(source.name)
        except ModelError as error:
            raise BundleError(
                f"the dense model of {self.path} cannot be loaded from {source.name!r}: {error.what}",
                hint="comparisons need the dense model; put it back where it was, or convert again",
            ) from error
        if loaded.fingerprint != source.fingerprint:
            raise BundleError(f"{source.name!r} holds another model now than when {self.path} was made", hint="convert the model again")
        return loaded

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None when the model came without one."""
        folder = self.path / "tokenizer"
        if not folder.is_dir():
            return None
        return load_tokenizer(folder)

    def processor(self) -> Any | None:
        """The image processor or feature extractor, or None when the model came without one."""
        folder = self.path / "processor"
        return load_processor(folder) if folder.is_dir() else None


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and verify every file.

    Raises:
        BundleError: it is not a bundle, is newer than this dyncomp, or a file is missing or was changed.
    """
    path = Path(path)
    file = path / MANIFEST
    if not path.exists():
        raise BundleError(f"{path} does not exist", hint="make a bundle with: dyncomp convert MODEL -o OUT")
    if not file.is_file():
        raise BundleError(f"{path} is not a dyncomp bundle (it has no {MANIFEST})", hint="make one with: dyncomp convert MODEL -o OUT")
    try:
        document = json.loads(file.read_bytes())
        version = document.get("schema_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > SCHEMA:
            raise BundleError(f"{path} was written by a newer dyncomp (schema {version}; this one reads {SCHEMA})", hint="update dyncomp")
        manifest = Manifest.model_validate(document)
    except (ValueError, ValidationError) as error:
        raise BundleError(f"{file} is damaged: {str(error).splitlines()[0]}", hint="convert the model again") from error
    for name, entry in manifest.files.items():
        part = path / name
        if not part.is_file():
            raise BundleError(f"{part} is missing from the bundle", hint="convert the model again")
        if part.stat().st_size != entry.bytes:
            raise BundleError(
                f"{part} has {part.stat().st_size} bytes, the manifest says {entry.bytes}: truncated or replaced",
                hint="convert the model again",
            )
        if _sha256(part) != entry.sha256:
            raise BundleError(f"{part} was changed since it was written (its checksum differs)", hint="convert the model again")
    return Bundle(path, manifest)


def is_bundle(path: str | Path) -> bool:
    """Whether ``path`` looks like a bundle (it has a manifest); nothing is verified."""
    return (Path(path) / MANIFEST).is_file()


def check_destination(out: Path) -> None:
    """Refuse to overwrite anything that is not an earlier bundle or an empty folder.

    Raises:
        RequestError: with what is in the way.
    """
    if out.is_file():
        raise RequestError(f"{out} is a file", hint="name a folder to write the bundle to")
    if out.is_dir() and any(out.iterdir()) and not is_bundle(out):
        raise RequestError(f"{out} exists and is not a dyncomp bundle", hint="choose another folder, or empty this one")
    if not out.absolute().parent.is_dir():
        raise RequestError(f"the folder {out.absolute().parent} does not exist", hint="create it first")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into an error that says so."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        what = f"the disk is full while writing to {where}" if full else f"cannot write to {where}: {error.strerror or error}"
        hint = "free some space and run the same command again: it continues" if full else "check the folder's permissions"
        raise DyncompError(what, hint=hint) from error
    except Exception as error:  # safetensors reports a full disk as an error of its own
        if "No space left" not in str(error):
            raise
        raise DyncompError(
            f"the disk is full while writing to {where}", hint="free some space and run the same command again: it continues"
        ) from error


def save_bundle_files(
    folder: Path, graph: Graph, report: dict[str, Any], *, tokenizer: Any | None = None, processor: Any | None = None
) -> None:
    """Write everything but the artifacts and the manifest into ``folder``."""
    save_graph(graph, folder / "graph.json", folder / "weights.safetensors")
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder / "tokenizer")
    if processor is not None:
        processor.save_pretrained(folder / "processor")


def seal(folder: Path, out: Path, manifest: Manifest) -> None:
    """Checksum every file of ``folder``, write the manifest, sync, and rename the folder to ``out``.

    An earlier bundle at ``out`` is replaced only once the new one is complete.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest.files = {str(p.relative_to(folder)): FileEntry(sha256=_sha256(p), bytes=p.stat().st_size) for p in files}
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
    for file in [*files, folder / MANIFEST]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(folder, out)
    shutil.rmtree(old, ignore_errors=True)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "onnxruntime", "onnxscript", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
