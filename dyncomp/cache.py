"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``DYNCOMP_CACHE``, else ``dyncomp`` in the user's cache folder. It may not exist yet."""
    if folder := os.environ.get("DYNCOMP_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyncomp"
