"""Routers made from the weights, with nothing regressed but one constant an expert."""

from __future__ import annotations

import torch
from dyncomp.passes.layerwise import ExpertView, Layer
from dyncomp.passes.routers.neuron import neuron_rows
from dyncomp.passes.routers.scores import Emit, Read, RouterOptions, Scores, targets
from torch import Tensor, fx

from dyncomp.activations import emit_activation
from dyncomp.graph import Builder

aten = torch.ops.aten


def mean_gate(layer: Layer, options: RouterOptions) -> Scores:
    """``scores = linear(x, W, 0)``, a row of W being the mean of the expert's gate rows (ExpertWeaver, 2602.15521), or of its up
    rows in an FFN without a gate."""
    view = layer.view
    _, up, _ = neuron_rows(view)
    rows = up[: view.experts * view.neurons].view(view.experts, view.neurons, -1)
    return Scores(torch.zeros(view.experts), rows.mean(1).contiguous())


def representative(layer: Layer, options: RouterOptions) -> Scores:
    """``scores = |act(linear(x, G)) * linear(x, U)|`` of one neuron an expert: the one whose activations are nearest to the expert's
    mean activation (CMoE, 2502.04416)."""
    view = layer.view
    mean = torch.zeros(view.experts, view.neurons)
    cross, squares, spread = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros(view.experts)
    for h in layer.hidden():  # [n, E, F]
        h = h.float().abs()
        center = h.mean(2, keepdim=True)
        cross += (h * center).sum(0)
        squares += h.square().sum(0)
        spread += center.square().sum((0, 2))
    nearest = (squares - 2 * cross + spread[:, None]).argmin(1)
    _, up, bias = neuron_rows(view)
    index = torch.arange(view.experts) * view.neurons + nearest
    width = view.experts * view.neurons
    chosen = torch.cat([index, index + width]) if view.gated else index
    features = {"neurons": up[chosen].contiguous()}
    if bias is not None:
        features["neurons_bias"] = bias[chosen].contiguous()
    return Scores(torch.zeros(view.experts), None, features, _emit_representative(view, bias is not None))


def _emit_representative(view: ExpertView, biased: bool) -> Emit:
    activation, experts, gated = view.activation, view.experts, view.gated

    def emit(b: Builder, x: fx.Node, read: Read) -> fx.Node:
        h = b.call(aten.linear.default, x, read("neurons"), *([read("neurons_bias")] if biased else []))
        if not gated:
            return b.call(aten.abs.default, emit_activation(b.call, activation, h))
        g = emit_activation(b.call, activation, b.call(aten.slice.Tensor, h, -1, 0, experts))
        return b.call(aten.abs.default, b.call(aten.mul.Tensor, g, b.call(aten.slice.Tensor, h, -1, experts, 2 * experts)))

    return emit


def spectral(layer: Layer, options: RouterOptions) -> Scores:
    """``scores = log(xᵀA_e x) + log(xᵀB_e x) + b_e``: A_e and B_e are the Gram matrices of the expert's gate and up rows, each
    kept in rank ``rank / E`` (at least 1) by its leading eigenvectors; b_e is the mean by which the logarithm of the expert's energy
    exceeds that. Without a gate there is the first term alone."""
    view = layer.view
    down, up, _ = neuron_rows(view)
    halves = up.view(-1, view.experts, view.neurons, view.d_model) * down.view(view.experts, view.neurons, 1).sqrt()
    rank = max(1, options.rank // view.experts)
    parts = []
    for half in halves:  # [E, F, d]: the leading right singular vectors, times their singular values
        _, s, v = torch.linalg.svd(half.float(), full_matrices=False)
        parts.append((s[:, :rank, None] * v[:, :rank]).flatten(0, 1).contiguous())  # [E * rank, d]
    names = ["gate_factors", "up_factors"][: len(parts)]
    features: dict[str, Tensor] = dict(zip(names, parts, strict=True))
    floor = 1e-6 * torch.stack([p.square().sum() for p in parts]).mean()
    features["floor"] = floor.reshape(1)
    difference, count = torch.zeros(view.experts), 0
    for x, target in zip(layer.inputs, targets(layer, "energy"), strict=True):
        rows = x.reshape(-1, view.d_model)
        logs = [((rows @ p.T).square().unflatten(1, (view.experts, rank)).sum(2) + floor).log() for p in parts]
        difference += (target - sum(logs)).sum(0)
        count += len(rows)
    return Scores(difference / count, None, features, _emit_spectral(view, names, rank))


def _emit_spectral(view: ExpertView, names: list[str], rank: int) -> Emit:
    experts = view.experts

    def emit(b: Builder, x: fx.Node, read: Read) -> fx.Node:
        total: fx.Node | None = None
        for name in names:
            z = b.call(aten.linear.default, x, read(name))
            mass = b.call(aten.sum.dim_IntList, b.call(aten.unflatten.int, b.call(aten.mul.Tensor, z, z), -1, [experts, rank]), [-1])
            log = b.call(aten.log.default, b.call(aten.add.Tensor, mass, read("floor")))
            total = log if total is None else b.call(aten.add.Tensor, total, log)
        assert total is not None
        return total

    return emit
