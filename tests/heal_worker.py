"""One of several processes that heal a model together; started by ``torchrun`` in the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dyncomp.heal import Settings, Trainer
from dyncomp.heal.ranks import joined, rank
from dyncomp.serialize import load_graph

SETTINGS = Settings(
    steps=12, bfloat16=False, lr=5e-4, router_lr=2.0, vector_lr=1.0, batch=8, together=1, evaluations=2, hold=0.02, balance=0.01
)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    graph, dense = (load_graph(folder / f"{name}.json", folder / f"{name}.safetensors") for name in ("graph", "dense"))
    text = load_file(folder / "text.safetensors")["text"]
    with joined():
        Trainer(graph, dense, text[:-8], text[-8:], SETTINGS).run()
        own = {name: value.detach().contiguous() for name, value in graph.constants().items()}
        save_file(own, folder / f"trained-{rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
