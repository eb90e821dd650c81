"""Options and fixtures for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; read when torch loads
import torch

torch.set_num_threads(1)  # tiny models; and the machine is shared
gc.set_threshold(20_000, 20, 20)  # tracing makes objects by the hundred thousand that stay: looking at them less often saves a twentieth


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files under tests/golden with what the code gives now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)`` compares a text with ``tests/golden/<name>``, or writes it with ``--update-golden``."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"{path} is missing: run pytest --update-golden"
        assert text == path.read_text(encoding="utf-8"), f"{path} differs: look at the difference, then run pytest --update-golden"

    return check


@pytest.fixture(autouse=True, scope="module")
def _collect_quickly() -> None:
    """What is there before a module's tests is not looked at again by the collections that conversions ask for."""
    gc.collect()
    gc.freeze()
