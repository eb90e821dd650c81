"""dyncomp turns an existing dense transformer into one that spends compute only where a token needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a source checkout `passes/` and `backends/` stand beside this folder (pyproject.toml maps them into the package
# when it is installed): let `import dyncomp.passes` find them there too.
_here = Path(__file__).resolve().parent
if not (_here / "passes").is_dir() and (_here.parent / "passes" / "__init__.py").is_file():
    __path__.append(str(_here.parent))


def __getattr__(name: str) -> Any:
    """``dyncomp.convert(model, tokenizer, recipe=…)``, imported when it is used: ``import dyncomp`` stays fast."""
    if name == "convert":
        import importlib

        return importlib.import_module("dyncomp.convert")
    raise AttributeError(f"module 'dyncomp' has no attribute {name!r}")
