"""A conversion from Python: a model in, something that generates and trains out.

python examples/api.py [MODEL]
"""

from __future__ import annotations

import sys
from typing import Any

import torch

import dyncomp


def main(model: Any = "smollm2-135m", tokenizer: Any = None, **options: Any) -> None:
    m = dyncomp.convert(model, tokenizer, **{"recipe": "experts", "active": 0.75, "backend": "torch"} | options)
    print(f"{m.report['active_ffn']:.0%} of the FFN neurons active, perplexity {m.report['perplexity']['converted']:.2f}")
    print(m.generate("The river", max_tokens=16))
    ids = torch.randint(2, 90, (2, 12))
    loss = m.module(ids).logsumexp(-1).mean()
    loss.backward()
    print(f"{sum(p.grad is not None for p in m.module.parameters())} tensors have gradients")


if __name__ == "__main__":
    main(*sys.argv[1:])
