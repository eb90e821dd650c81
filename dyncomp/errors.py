"""Every error dyncomp raises on purpose: what was found, where, and what to do next.

The command line prints ``str(error)`` and exits with ``error.exit_code``: 2 when the request was wrong (a path, an
option, a damaged input), 1 when the work itself failed.
"""

from __future__ import annotations


class DyncompError(Exception):
    """Base of all errors raised by dyncomp.

    Args:
        what: what was found, and where.
        hint: what the user can do next; printed on a line of its own.
    """

    exit_code = 1

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\n  -> {self.hint}"


class RequestError(DyncompError):
    """The request cannot be served as it was made: an option, a path or a name is wrong."""

    exit_code = 2


class ModelError(RequestError):
    """A model source is missing, damaged, truncated, or of an unknown kind."""


class MissingExtraError(RequestError):
    """An optional package is needed and absent; the hint is the pip command that brings it."""

    def __init__(self, package: str, *, needed_for: str, extra: str | None = None) -> None:
        target = f"dyncomp[{extra}]" if extra else package
        super().__init__(f"{needed_for} needs the package {package!r}, which is not installed", hint=f"pip install '{target}'")
        self.package = package


class TextError(RequestError):
    """A text to calibrate or evaluate on is missing, empty or too short."""


class SoundError(RequestError):
    """Recordings to calibrate, evaluate or transcribe are missing, damaged, too long or too few, or text cannot be spoken."""


class ImageError(RequestError):
    """Images to calibrate or evaluate on are missing, damaged or too few."""


class BundleError(RequestError):
    """A bundle is damaged, truncated, foreign or newer than this dyncomp."""


class TraceError(DyncompError):
    """A model could not be traced into a graph."""


class GraphError(DyncompError):
    """A graph is malformed, or cannot be read or written."""


class PassError(DyncompError):
    """A pass failed; names the pass, the passes that ran before it, and chains the cause."""


class SearchError(DyncompError):
    """No candidate of a search reaches its goal."""


class BackendError(DyncompError):
    """A backend cannot lower or run something; names it."""


class ProviderError(BackendError, RequestError):
    """An execution provider or device was asked for that this machine does not have."""

    exit_code = 2
