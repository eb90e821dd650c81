"""The examples run, and the one in the documentation is the one in the repository."""

from __future__ import annotations

import builtins
import contextlib
import importlib.machinery
import importlib.util
import io
import itertools
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_close

import dyncomp.api
from dyncomp.api import ConvertedModule
from dyncomp.errors import ModelError
from dyncomp.report.progress import ProgressReporter

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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(what the example in Python prints, its conversion)"""
    from tiny_checkpoint import write_checkpoint, write_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = tmp_path_factory.mktemp("api")
    folder, text = write_checkpoint(place / "model"), write_text(place / "text.txt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"tokens": 1024, "windows": 1, "calibrate": str(text), "other": None, "experts": 4, "show": False, "out": place / "out"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        load("api").main(model, tokenizer, **options)
    return out.getvalue(), dyncomp.api.Converted(place / "out", "torch", {})


def test_the_example_in_python(made) -> None:
    """On a model in memory; it generates and has gradients."""
    out, converted = made
    assert re.search(r"\d+% of the FFN neurons active, perplexity \d", out)
    assert "The river" not in out.splitlines()[0]
    assert f"{len(list(converted.module.parameters()))} tensors have gradients" in out
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        assert_close(converted.module(ids), converted.bundle.graph()(input_ids=ids), rel=1e-6)


def test_a_converted_module_compiles(made) -> None:
    """With inductor."""
    ids = torch.randint(2, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(torch.compile(made[1].module)(ids), made[1].module(input_ids=ids), rel=1e-5)


def test_a_converted_module_learns(made) -> None:
    """Five steps of an optimiser on one batch: its loss falls, and routers move too."""
    module = ConvertedModule(made[1].bundle.graph())
    ids = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(module(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(b < a for a, b in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.97 * losses[0], losses
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert any("router" in name for name in moved)


class ZMQInteractiveShell:
    """By its name rich knows a notebook."""


@pytest.mark.parametrize("widgets", [True, False])
def test_progress_in_a_notebook(monkeypatch, capsys, widgets: bool) -> None:
    """A bar that is drawn again in one cell, where there are widgets; else plain lines."""
    shown: list[Any] = []

    class Output:
        def __enter__(self) -> None:
            shown.append("cell")

        def __exit__(self, *_: object) -> None: ...

        def clear_output(self, wait: bool = False) -> None:
            shown.append("cleared")

    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    modules = {"IPython": {}, "IPython.display": {"display": shown.append}} | ({"ipywidgets": {"Output": Output}} if widgets else {})
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    if not widgets:
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with ProgressReporter() as progress:
        assert progress.console.is_jupyter
        for done in range(3):
            progress("calibrate", done, 2)
        progress.say("half way")
    texts = "".join(s._repr_mimebundle_([], [])["text/plain"] for s in shown if hasattr(s, "_repr_mimebundle_"))
    errors = capsys.readouterr().err
    assert "half way" in texts
    assert ("cleared" in shown) == ("2/2" in texts) == widgets
    assert ("calibrate: done" in errors) == (not widgets)


def test_mixture_of_depths_from_scratch(tmp_path, capsys) -> None:
    """It learns, at the FLOPs of the dense model; skipped tokens keep what they were, and each is computed as it would be alone."""
    from tiny_checkpoint import write_text

    example = load("train_mod")
    example.main(["--steps", "12", "--depth", "2", "--text", str(write_text(tmp_path / "text.txt"))])
    out = capsys.readouterr().out
    flops = [float(f) for f in re.findall(r"([\d.]+) MFLOPs", out)]
    assert len(flops) == 2
    assert flops[1] <= flops[0]
    bits = [float(b) for b in re.findall(r"^(?:dense|Mixture-of-Depths|… tokens as predicted) .*?(\d\.\d{3}) ", out, re.M)]
    assert len(bits) == 3
    assert max(bits) < 7.5  # 8 bits before it learned anything
    torch.manual_seed(0)
    block, x = example.Skipped(), torch.randn(2, 32, example.WIDTH)
    with torch.no_grad():
        moved = (block(x) != x).any(-1)
        assert moved.sum(1).tolist() == [4, 4]
        assert torch.equal(moved, torch.zeros_like(moved).scatter(1, block.router(x)[..., 0].topk(4).indices, value=True))
        block.predicts = True
        expected = block.predictor(x)[..., 0] > 0
        assert torch.equal((block(x) != x).any(-1), expected)


def test_a_module_that_does_not_say_what_it_takes_needs_examples() -> None:
    with pytest.raises(ModelError, match="without example inputs"):
        dyncomp.convert(torch.nn.Linear(3, 3), show=False)


def test_importing_dyncomp_is_fast() -> None:
    code = "import sys, dyncomp; print('torch' in sys.modules, callable(dyncomp.convert))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "True"]
