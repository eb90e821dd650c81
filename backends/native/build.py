"""Compile a library of the operators for one runtime on first use, and keep it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dyncomp.backends.native.cross import cross_compiler, this_architecture

from dyncomp.cache import cache_folder
from dyncomp.errors import BackendError

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_FLAGS_OF = {
    "avx2.cc": _AVX2,
    "avx512.cc": (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"),
}
_ONE_AT_A_TIME = threading.Lock()
HINT = "install g++ (or clang++), or name a C++ compiler in the environment variable CXX"


def library(host: Path, folder: Path | None = None, *, includes: Sequence[str] = (), architecture: str | None = None) -> Path:
    """The operators with the wrapper of a runtime, as a shared library, compiled when it is not in the cache.

    Args:
        host: the folder of the wrapper's sources.
        folder: where compiled libraries are kept; by default ``native`` in dyncomp's cache folder.
        includes: folders of headers that the wrapper needs.
        architecture: what the library is for; by default this machine's. Any other takes a cross compiler.

    Raises:
        BackendError: there is no C++ compiler, it cannot compile the library, or the folder cannot be written.
    """
    here = this_architecture()
    architecture = architecture or here
    compiler = _compiler() if architecture == here else cross_compiler(architecture, "c++")
    if compiler is None:
        raise BackendError(_missing(), hint=HINT)
    folder = cache_folder() / "native" if folder is None else folder
    settings = (compiler, _version(compiler), _FLAGS, _FLAGS_OF, architecture)
    sources: dict[Path, str] = {}
    headers: list[Path] = []
    for place, more in ((_HERE, ()), (host, tuple(includes))):
        headers += sorted(place.glob("*.h"))
        sources |= {path: _key([path, *headers], (settings, more)) for path in sorted(place.glob("*.cc"))}
    path = folder / f"dyncomp-{_key([], tuple(sources.values()))}.so"
    with _ONE_AT_A_TIME:
        if not path.is_file():
            try:
                _build(compiler, architecture, sources, includes, path)
            except OSError as error:
                raise BackendError(
                    f"the native operators cannot be written to {folder}: {error.strerror or error}",
                    hint="set DYNCOMP_CACHE to a folder that can be written",
                ) from error
    return path


def begin(compile_library: Callable[[], Path]) -> None:
    """Compile in the background what will be needed later; who then asks for the library waits for it. What goes wrong is said there."""

    def work() -> None:
        with contextlib.suppress(BackendError):
            compile_library()

    threading.Thread(target=work, name="native operators", daemon=True).start()


def available() -> bool:
    """Whether :func:`library` can be expected to work."""
    return unavailable_reason() is None


def unavailable_reason() -> str | None:
    """Why there is no library on this machine; None when there is one."""
    if os.name != "posix":
        return "the native operators are compiled on Linux and macOS only"
    return None if _compiler() else _missing()


def _compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler, from CXX or the usual names."""
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    commands = [tuple(shlex.split(w)) for w in wanted]
    return next((c for c in commands if c and shutil.which(c[0])), None)


def _missing() -> str:
    named = os.environ.get("CXX")
    return f"the C++ compiler that CXX names is not there: {named}" if named else "there is no C++ compiler on this machine"


@functools.cache
def _version(compiler: tuple[str, ...]) -> str:
    return _run([*compiler, "--version"])


def _key(files: Sequence[Path], settings: tuple[object, ...]) -> str:
    """Changes with what is in the files, and the settings."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _build(compiler: tuple[str, ...], architecture: str, sources: dict[Path, str], includes: Sequence[str], path: Path) -> None:
    """Compile each source and link; what is made appears under its name when it is whole. Object files are kept: the libraries for
    several runtimes share most of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent) as temporary:

        def compile_one(source: Path) -> str:
            found = path.parent / f"{source.stem}-{sources[source]}.o"
            if not found.is_file():
                flags = (
                    *_FLAGS,
                    *(_FLAGS_OF.get(source.name, ()) if architecture == "x86_64" else ()),
                    *(f"-I{i}" for i in (_HERE, *includes)),
                )
                part = Path(temporary) / found.name
                _run([*compiler, *flags, "-c", str(source), "-o", str(part)])
                os.replace(part, found)
            return str(found)

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compile_one, sources))
        whole = Path(temporary) / path.name
        _run([*compiler, "-shared", "-o", str(whole), *objects])
        os.replace(whole, path)


def _run(command: list[str]) -> str:
    """Run the compiler; returns what it prints.

    Raises:
        BackendError: with the first line of its errors.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise BackendError(f"the C++ compiler {command[0]} does not start: {error}", hint=HINT) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit code {done.returncode}")
        raise BackendError(f"{command[0]} cannot compile the native operators: {first[:300]}", hint=HINT)
    return done.stdout
