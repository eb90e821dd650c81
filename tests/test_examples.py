"""The examples run, and the one in the documentation is the one in the repository."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_pass_of_ones_own(capsys) -> None:
    load("clamp_pass").main()
    assert re.search(r"clamp-hidden\{limit=6.0\}: 6 FFNs, outputs moved by \d", capsys.readouterr().out)


def test_the_documented_pass_is_the_example() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "write-a-pass.md").read_text(), re.S).group(1)
    assert code.strip() in (ROOT / "examples" / "clamp_pass.py").read_text()


@pytest.mark.slow
def test_the_steps_from_python(capsys) -> None:
    load("api").main()
    out = capsys.readouterr().out
    assert "384 -> 1536 gelu" in out
    assert re.search(r"5 routed FFNs; .* differ by \d\.\de-0[678]", out)
