"""One FFN, many spellings: each is found, named by what it computes, and replaceable. And what is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, route
from torch import Tensor, nn

from dyncomp.graph import Graph
from dyncomp.regions import find_regions
from dyncomp.trace import trace

D, H = 16, 32


class Spelled(nn.Module):
    """``x + body(parameters, x)`` with parameters of the given shapes."""

    def __init__(self, body: Callable[..., Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = body
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) / 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(self, x)


def traced(module: nn.Module, *, shape: tuple[int, ...] = (2, 5, D), dims: dict[int, str] | None = None) -> Graph:
    return trace(module, {"x": torch.randn(shape)}, {"x": dims or {0: "batch", 1: "sequence"}})


UP, DOWN, FUSED = {"u": (H, D)}, {"d": (D, H)}, {"u": (2 * H, D)}
SEPARATE = {"g": (H, D), "u": (H, D)}


def gated(m, x, act):
    return F.linear(act(F.linear(x, m.g)) * F.linear(x, m.u), m.d)


def halves(m, x, first, second):
    h = F.linear(x, m.u)
    return F.linear(F.silu(h[..., first]) * h[..., second], m.d)


SPELLINGS: dict[str, tuple[Spelled, str, str]] = {
    # name: (module, activation, layout)
    "matmul, biases added after": (
        Spelled(lambda m, x: torch.relu(x @ m.u + m.a) @ m.d + m.b, u=(D, H), a=(H,), d=(H, D), b=(D,)), "relu", "plain"),
    "einsum": (
        Spelled(lambda m, x: torch.einsum("bsf,fd->bsd", F.silu(torch.einsum("bsd,df->bsf", x, m.u)), m.d), u=(D, H), d=(H, D)),
        "silu", "plain"),
    "einsum, weight first and transposed": (
        Spelled(lambda m, x: F.linear(F.gelu(torch.einsum("fd,bsd->bsf", m.u, x)), m.d), **UP, **DOWN), "gelu", "plain"),
    "flattened tokens": (
        Spelled(lambda m, x: torch.addmm(m.b, torch.tanh(torch.addmm(m.a, x.reshape(-1, D), m.u)), m.d).view(x.shape),
                u=(D, H), a=(H,), d=(H, D), b=(D,)), "tanh", "plain"),
    "silu written out": (Spelled(lambda m, x: F.linear((h := F.linear(x, m.u)) * torch.sigmoid(h), m.d), **UP, **DOWN), "silu", "plain"),
    "gelu by erf": (
        Spelled(lambda m, x: F.linear((h := F.linear(x, m.u)) * 0.5 * (1 + torch.erf(h / 2**0.5)), m.d), **UP, **DOWN), "gelu", "plain"),
    "squared relu": (Spelled(lambda m, x: F.linear(F.relu(F.linear(x, m.u)) ** 2, m.d), **UP, **DOWN), "relu2", "plain"),
    "quick gelu": (
        Spelled(lambda m, x: F.linear((h := F.linear(x, m.u)) * torch.sigmoid(1.702 * h), m.d), **UP, **DOWN), "quick_gelu", "plain"),
    "bilinear": (Spelled(lambda m, x: gated(m, x, lambda h: h), **SEPARATE, **DOWN), "identity", "separate"),
    "geglu": (Spelled(lambda m, x: gated(m, x, F.gelu), **SEPARATE, **DOWN), "gelu", "separate"),
    "multiplied the other way round": (
        Spelled(lambda m, x: F.linear(F.linear(x, m.u) * F.silu(F.linear(x, m.g)), m.d), **SEPARATE, **DOWN), "silu", "separate"),
    "gate first": (Spelled(lambda m, x: halves(m, x, slice(0, H), slice(H, None)), **FUSED, **DOWN), "silu", "gate|up"),
    "up first": (Spelled(lambda m, x: halves(m, x, slice(H, None), slice(0, H)), **FUSED, **DOWN), "silu", "up|gate"),
    "interleaved": (
        Spelled(lambda m, x: halves(m, x, slice(0, None, 2), slice(1, None, 2)), **FUSED, **DOWN), "silu", "gate,up interleaved"),
    "interleaved, up first": (
        Spelled(lambda m, x: halves(m, x, slice(1, None, 2), slice(0, None, 2)), **FUSED, **DOWN), "silu", "up,gate interleaved"),
    "glu": (Spelled(lambda m, x: F.linear(F.glu(F.linear(x, m.u, m.a)), m.d), **FUSED, a=(2 * H,), **DOWN), "sigmoid", "up|gate"),
    "one of two biases": (
        Spelled(lambda m, x: F.linear(F.silu(F.linear(x, m.g, m.a)) * F.linear(x, m.u), m.d), **SEPARATE, a=(H,), **DOWN),
        "silu", "separate"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str):
    module, activation, layout = SPELLINGS[name]
    check(module, traced(module), activation, layout, torch.randn(3, 4, D))


def test_convolutions():
    """Kernel 1, channels first."""
    module = Spelled(lambda m, x: F.conv1d(F.gelu(F.conv1d(x, m.u, m.a)), m.d), u=(H, D, 1), a=(H,), d=(D, H, 1))
    check(module, traced(module, shape=(2, D, 5), dims={0: "batch", 2: "sequence"}), "gelu", "plain", torch.randn(3, D, 4))
    module = Spelled(lambda m, x: F.conv2d(F.relu(F.conv2d(x, m.u)), m.d), u=(H, D, 1, 1), d=(D, H, 1, 1))
    check(module, traced(module, shape=(2, D, 5, 6), dims={0: "batch"}), "relu", "plain", torch.randn(3, D, 5, 6))


def test_channels_moved_last_and_back():
    def body(m, x):
        return F.linear(F.gelu(F.linear(x.permute(0, 2, 3, 1), m.u)), m.d).permute(0, 3, 1, 2)

    module = Spelled(body, **UP, **DOWN)
    check(module, traced(module, shape=(2, D, 5, 6), dims={0: "batch"}), "gelu", "plain", torch.randn(3, D, 5, 6))


def check(module: nn.Module, graph: Graph, activation: str, layout: str, x: Tensor) -> None:
    regions = find_regions(graph)
    (ffn,) = regions.ffns
    assert (ffn.activation, ffn.layout) == (activation, layout)
    assert [b.regions for b in regions.blocks] == [(ffn,)]
    route(graph, ffn, experts=4)
    graph.clean()
    assert_close(graph(x), module(x), rel=1e-6)


def normed(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)


class Aside(Spelled):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x, self.u))
        return F.linear(h, self.d) + h.mean()


REFUSED: dict[str, tuple[nn.Module, str]] = {
    "a parameter per feature": (
        Spelled(lambda m, x: F.linear((h := F.linear(x, m.u)) * torch.sigmoid(m.p * h), m.d), **UP, **DOWN, p=(H,)),
        "its activation has a parameter of 32 values"),
    "a norm": (Spelled(lambda m, x: F.linear(F.layer_norm(F.gelu(F.linear(x, m.u)), (H,)), m.d), **UP, **DOWN),
               "its hidden activations are normalised together (layer_norm)"),
    "a norm written out": (Spelled(lambda m, x: F.linear(normed(F.gelu(F.linear(x, m.u))), m.d), **UP, **DOWN),
                           "its hidden activations are combined with the result of rsqrt, which has another shape"),
    "a mix of tokens": (
        Spelled(lambda m, x: F.linear(F.gelu(F.conv1d(F.linear(x, m.u).transpose(1, 2), m.k, padding=1, groups=H).transpose(1, 2)), m.d),
                **UP, **DOWN, k=(H, 1, 3)), "conv1d mixes tokens or features of its hidden activations"),
    "an unknown activation": (Spelled(lambda m, x: F.linear(torch.sin(F.linear(x, m.u)), m.d), **UP, **DOWN),
                              "its activation is none we know"),
    "another width": (nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 8)), "it takes 16 features and gives 8"),
    "hidden values used elsewhere": (Aside(lambda m, x: x, **UP, **DOWN), "its hidden activations are also used by mean"),
    "two inputs": (
        Spelled(lambda m, x: F.linear(F.silu(F.linear(x, m.g)) * F.linear(x.flip(1), m.u), m.d), **SEPARATE, **DOWN),
        "its up-projections read different inputs"),
    "reordered tokens": (
        Spelled(lambda m, x: F.linear(F.relu(F.linear(x, m.u)).transpose(0, 1), m.d).transpose(0, 1), **UP, **DOWN),
        "its tokens change places inside it"),
    "tokens against tokens": (
        Spelled(lambda m, x: F.linear((torch.relu(h := F.linear(x, m.u)).unsqueeze(1) * h.unsqueeze(2)), m.d).sum(1), **UP, **DOWN),
        "its hidden activations are combined with the result of unsqueeze, which has another shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str):
    module, reason = REFUSED[name]
    argument = "x" if isinstance(module, Spelled) else "input"
    graph = trace(module, {argument: torch.randn(2, 5, D)}, {argument: {0: "batch", 1: "sequence"}})
    regions = find_regions(graph)
    assert regions.ffns == []
    (refusal,) = regions.refusals
    assert (refusal.what, refusal.reason) == ("ffn", reason)
    assert refusal.remedy


def test_two_linears_are_no_ffn_and_not_worth_a_word():
    regions = find_regions(traced(Spelled(lambda m, x: F.linear(F.linear(x, m.u), m.d), **UP, **DOWN)))
    assert (regions.ffns, regions.refusals) == ([], [])


def test_a_constant_without_value_is_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.d = nn.Linear(D, H), nn.Linear(H, D)
            self.register_buffer("scale", torch.tensor(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.d(F.silu(self.u(x) * self.scale))

    (ffn,) = find_regions(traced(Scaled())).ffns
    assert ffn.activation == "silu"
    graph = trace(Scaled().to("meta"), {"x": torch.empty(2, 5, D, device="meta")}, {"x": {0: "batch", 1: "sequence"}})
    (refusal,) = find_regions(graph).refusals
    assert "the constant 'scale' has no value here" in refusal.reason
