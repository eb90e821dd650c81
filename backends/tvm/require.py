"""Which TVM this works with; a bad combination is named before it does harm."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dyncomp.errors import BackendError, MissingExtraError

TVM, FFI = "0.27.0.post1", "0.1.14.post1"
_NEEDED_FOR = "the TVM backend"


def require_runtime() -> None:
    """Raises:
    MissingExtraError: TVM is not installed.
    BackendError: apache-tvm and apache-tvm-ffi are of versions that do not work together.
    """
    for package, wanted in (("apache-tvm", TVM), ("apache-tvm-ffi", FFI)):
        try:
            found = version(package)
        except PackageNotFoundError as error:
            raise MissingExtraError(package, needed_for=_NEEDED_FOR, extra="tvm") from error
        if found != wanted:
            raise BackendError(
                f"{_NEEDED_FOR} works with apache-tvm {TVM} and apache-tvm-ffi {FFI} (a newer apache-tvm-ffi crashes when tuning records "
                f"are saved); installed is {package} {found}",
                hint=f"pip install apache-tvm=={TVM} apache-tvm-ffi=={FFI}",
            )


def require_compiler() -> None:
    """As :func:`require_runtime`; compiling takes no more packages, but imports all of TVM (seconds)."""
    require_runtime()
    import tvm  # noqa: F401
