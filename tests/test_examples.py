"""The examples run, and the one in the documentation is the one in the repository."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close

import dyncomp.api
from dyncomp.errors import ModelError

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


def test_the_example_in_python(tmp_path, capsys) -> None:
    """On a model in memory; it generates, trains and compiles."""
    from tiny_checkpoint import write_checkpoint, write_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, text = write_checkpoint(tmp_path / "model"), write_text(tmp_path / "text.txt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    options = {"tokens": 1024, "windows": 1, "calibrate": str(text), "other": None, "experts": 4, "show": False, "out": tmp_path / "out"}
    load("api").main(model, tokenizer, **options)
    out = capsys.readouterr().out
    assert re.search(r"\d+% of the FFN neurons active, perplexity \d", out)
    assert "The river" not in out.splitlines()[0]
    made = dyncomp.api.Converted(tmp_path / "out", "torch", {})
    assert f"{len(list(made.module.parameters()))} tensors have gradients" in out
    ids = torch.randint(2, 300, (2, 9))
    with torch.no_grad():
        assert_close(torch.compile(made.module, backend="eager")(ids), made.module(input_ids=ids), rel=1e-5)
        assert_close(made.module(ids), made.bundle.graph()(ids), rel=1e-6)


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
