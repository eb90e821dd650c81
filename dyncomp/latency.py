"""How long layers take on this machine: a table that is measured as it is asked, and kept.

A row is a layer by its sizes and what passes make of it: an FFN of 576 inputs and 1536 neurons, 48 experts of which a token gets 75 %,
4 bits. Some copies of it with random weights go through those very passes and the backend's lowering, and are timed; a model's rows are
the same whatever its weights are, so the next search on this machine only looks them up.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyncomp import hardware
from dyncomp.activations import ACTIVATIONS
from dyncomp.cache import cache_folder
from dyncomp.calibrate import Calibration, calibrate
from dyncomp.graph import Graph
from dyncomp.pipeline import Context, Pass
from dyncomp.regions import FFN, find_regions
from dyncomp.runtime.bench import timed
from dyncomp.sweep import release_memory
from dyncomp.trace import trace
from dyncomp.whole import replacing

COPIES = 12
"""Layers in what is timed: what a run costs besides them counts little."""
PROMPT = 128
"""Tokens of the prompt that is timed."""
_FITTED = 512  # random tokens that the passes are fitted to
_RUNS, _WARM = 36, 3


@dataclass(frozen=True)
class Layer:
    """A linear layer, or with ``neurons`` an FFN.

    Args:
        columns: input features. rows: output features.
        bias: of every linear layer in it.
        neurons: hidden ones of an FFN.
    """

    columns: int
    rows: int
    bias: bool
    neurons: int = 0
    gated: bool = False
    activation: str = ""

    def __str__(self) -> str:
        bias = " bias" if self.bias else ""
        if not self.neurons:
            return f"linear {self.columns}x{self.rows}{bias}"
        return f"ffn {self.columns}x{self.neurons}x{self.rows} {'gated ' if self.gated else ''}{self.activation}{bias}"

    def module(self) -> nn.Module:
        """One with random weights."""
        if not self.neurons:
            return nn.Linear(self.columns, self.rows, self.bias)
        return _FFN(self)


def ffn_layer(ffn: FFN) -> Layer:
    """An FFN by its sizes."""
    return Layer(ffn.d_model, ffn.d_out, ffn.down.bias is not None, ffn.d_ff, ffn.gated, ffn.activation)


def row_name(layer: Layer, passes: Sequence[Pass] = ()) -> str:
    """What a row of the table is called: a layer, and what these passes made of it."""
    return f"{layer}; {', '.join(p.spec for p in passes) or 'dense'}"


def layers_of(graph: Graph) -> collections.Counter[Layer]:
    """How many of which layers a dense graph has, without its vocabulary head and what is not a matrix of features."""
    regions = find_regions(graph)
    found = collections.Counter(ffn_layer(f) for f in regions.ffns if f.input_axis == -1)
    inside = {linear.node for f in regions.ffns for linear in (*f.ups, f.down)}
    if regions.head is not None:
        inside.add(regions.head.linear.node)
    others = {i.node: i for i in regions.linears.values() if i.axis == -1 and i.node not in inside}
    return found + collections.Counter(Layer(i.in_features, i.out_features, i.bias is not None) for i in others.values())


@dataclass
class LatencyTable:
    """Seconds of layers after passes, from a file in the cache folder that belongs to this machine and these kernels.

    Args:
        lower: (graph, folder) writes an artifact; ``open``: (folder, threads=…) opens it: of the backend.
        kernels: says which versions of them were measured.
    """

    lower: Callable[[Graph, Path], Any]
    open: Callable[..., Any]
    kernels: str
    threads: int

    def __post_init__(self) -> None:
        machine = [asdict(hardware.detect()), self.threads, self.kernels, torch.__version__, COPIES]
        self.file = cache_folder() / "latency" / f"{hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:24]}.json"
        self._known: tuple[float, dict[str, tuple[float, float]]] | None = None

    def seconds(self, layer: Layer, passes: Sequence[Pass]) -> tuple[float, float]:
        """Of one such layer after ``passes``: for one token, whose weights come from memory, and for :data:`PROMPT` tokens."""
        kind = "ffn" if layer.neurons else "linear"
        sketched = [sketch for p in passes if (sketch := p.sketch(kind)) is not None]
        key = row_name(layer, sketched)
        if key not in self.rows:
            self._keep(key, self._measure(layer, sketched))
        return self.rows[key]

    def per_token(self, layers: Mapping[Layer, int], passes: Sequence[Pass], *, decoding: bool) -> float:
        """Of all the layers of a model: of a step of decoding, or of a token of a prompt."""
        found = [(count, self.seconds(layer, passes)) for layer, count in layers.items()]
        return sum(count * (one if decoding else prompt / PROMPT) for count, (one, prompt) in found)

    @property
    def rows(self) -> dict[str, tuple[float, float]]:
        """All that is known by now."""
        return self._contents[1]

    @property
    def _contents(self) -> tuple[float, dict[str, tuple[float, float]]]:
        """Seconds of a read of :attr:`_memory` when the table was begun, and its rows. A damaged file counts as absent: it is a cache."""
        if self._known is None:
            try:
                kept = json.loads(self.file.read_bytes())
                self._known = float(kept["reading"]), {str(k): (float(one), float(prompt)) for k, (one, prompt) in kept["rows"].items()}
            except (OSError, ValueError, AttributeError, TypeError, KeyError):
                self._known = statistics.median(timed(self._memory.sum) for _ in range(_RUNS)), {}
        return self._known

    @functools.cached_property
    def _memory(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """So much that once it is read nothing else is left in the processor's caches. How long that takes says how fast the machine is
        at that moment: others that share it make it up to a third slower for seconds or minutes."""
        return np.ones(2 * hardware.cache_bytes() // 8)

    def _keep(self, key: str, seconds: tuple[float, float]) -> None:
        reading, rows = self._contents
        rows[key] = seconds
        with replacing(self.file) as part:
            part.write_text(json.dumps({"reading": reading, "rows": rows}, indent=1) + "\n")

    def _measure(self, layer: Layer, passes: Sequence[Pass]) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            self.lower(sample(layer, passes), Path(folder))
            release_memory()  # of this row's layers and the last one's
            model = self.open(Path(folder), threads=self.threads)
            return self._median(model, layer, 1, _RUNS), self._median(model, layer, PROMPT, _RUNS // 4)

    def _median(self, model: Any, layer: Layer, tokens: int, runs: int) -> float:
        """Seconds of one of the copies, if the machine is as fast as when the table was begun."""
        x = np.random.default_rng(0).standard_normal((1, tokens, layer.columns)).astype(np.float32)
        ratios = []
        for _ in range(_WARM + runs):
            reading = timed(self._memory.sum)
            ratios.append(timed(lambda: model.run(x=x)) / reading)
        return statistics.median(ratios[_WARM:]) * self._contents[0] / COPIES


def sample(layer: Layer, passes: Sequence[Pass]) -> Graph:
    """:data:`COPIES` of a layer that read the same input [1, tokens, columns], after passes; the output is their sum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = _Sum([layer.module() for _ in range(COPIES)]).requires_grad_(False).eval()
        x = torch.randn(1, _FITTED, layer.columns)
    graph = trace(module, {"x": x[:, :16]}, {"x": {1: "sequence"}})
    calibration = Calibration([{"x": x}], f"random {layer}")
    ctx = Context(calibration, dense=graph.copy())
    if any(p.reads_statistics for p in passes):
        calibrate(graph, find_regions(graph).ffns, calibration)
    for item in passes:
        item.run(graph, ctx)
    return graph


class _FFN(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.up = nn.Linear(layer.columns, layer.neurons, layer.bias)
        self.gate = nn.Linear(layer.columns, layer.neurons, layer.bias) if layer.gated else None
        self.down = nn.Linear(layer.neurons, layer.rows, layer.bias)
        self._activation = layer.activation

    def forward(self, x: Tensor) -> Tensor:
        h = ACTIVATIONS[self._activation](self.up(x) if self.gate is None else self.gate(x))
        y: Tensor = self.down(h if self.gate is None else h * self.up(x))
        return y


class _Sum(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self.parts]).sum(0)
