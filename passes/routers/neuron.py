"""Routers that predict every neuron in low rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from dyncomp.passes.layerwise import ExpertView, Layer
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.routers.scores import Emit, Read, RouterOptions, Scores, targets
from torch import Tensor, fx

from dyncomp.activations import ACTIVATIONS, emit_activation
from dyncomp.graph import Builder

aten = torch.ops.aten


def neuron(layer: Layer, options: RouterOptions) -> Scores:
    """Pre-activations of all neurons through ``z = linear(x, A)``, A: [rank, d], squared and summed up by expert; then a linear layer.

    ``m[e] = log(sum over e of (act(linear(z, G)) * linear(z, U))² ||w_down||²); scores = linear(cat(x, m), W, b)``

    The low-rank predictors of DejaVu (2310.17157) and PowerInfer (2312.12456), but of pre-activations: A keeps the directions of x
    that matter most to them (reduced-rank regression on the calibration inputs, each row weighted by the norm of its column of the
    down-projection), so that nothing is trained. Costs ``rank * (d + 2 F)`` multiply-accumulates a token (``F`` without a gate).
    """
    view = layer.view
    mean = torch.cat([x.reshape(-1, view.d_model) for x in layer.inputs]).mean(0)
    norms, up, bias = neuron_rows(view)
    weights = norms.repeat(len(up) // len(norms))[:, None].clamp_min(1e-12)
    project, expand = _reduced_rank(layer.inputs, mean, up * weights, options.rank)
    expand = expand / weights
    # Around the mean of x, which the projection need not carry: up x = expand (project (x - mean)) + up mean
    offset = up @ mean - expand @ (project @ mean) + (0 if bias is None else bias)
    rows, offsets = expand.chunk(2 if view.gated else 1), offset.chunk(2 if view.gated else 1)
    tensors = {"project": project, "expand": rows[0], "expand_bias": offsets[0], "norms": norms}
    if view.gated:
        tensors |= {"times": rows[1], "times_bias": offsets[1]}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    floor = 1e-3 * _mass(layer.inputs[0].reshape(-1, view.d_model), tensors, view).mean()
    tensors["floor"] = floor.reshape(1)
    problem = LeastSquares(view.d_model + view.experts, view.experts)
    for x, target in zip(layer.inputs, targets(layer, options.target), strict=True):
        tokens = x.reshape(-1, view.d_model)
        problem.add(torch.cat([tokens, (_mass(tokens, tensors, view) + floor).log()], 1), target)
    weight, last = problem.solve(options.ridge)
    return Scores(last, weight.T.contiguous(), tensors, _emitter(view))


def neuron_rows(view: ExpertView) -> tuple[Tensor, Tensor, Tensor | None]:
    """(norm of each neuron's column of the down-projection [F], the rows of all up-projections [(2)F, d], their biases), expert by
    expert, the rows under the activation first."""
    halves = view.w_up.unflatten(1, (-1, view.neurons))  # [E, 1 or 2, F / E, d]
    up = halves.transpose(0, 1).reshape(-1, view.d_model)
    bias = None if view.b_up is None else view.b_up.unflatten(1, (-1, view.neurons)).transpose(0, 1).reshape(-1)
    return view.w_down.norm(dim=1).flatten(), up, bias


def _reduced_rank(inputs: list[Tensor], mean: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [r, d], B [n, r]) that minimise the mean of ||W x - B A x||² over the inputs less their mean."""
    d = weight.shape[1]
    moment = torch.zeros(d, d, dtype=torch.float64)
    count = 0
    for x in inputs:
        rows = x.reshape(-1, d) - mean
        moment += (rows.T @ rows).double()
        count += len(rows)
    moment = moment / count
    values, vectors = torch.linalg.eigh(moment + 1e-4 * moment.diagonal().mean() * torch.eye(d, dtype=torch.float64))
    root = vectors * values.clamp_min(1e-12).sqrt()  # root rootᵀ = moment
    product = weight.double() @ root
    _, kept = torch.linalg.eigh(product.T @ product)
    kept = kept[:, -min(rank, d) :]
    inverse = vectors / values.clamp_min(1e-12).sqrt()
    return (inverse @ kept).T.float().contiguous(), (product @ kept).float().contiguous()


def _mass(x: Tensor, t: dict[str, Tensor], view: ExpertView) -> Tensor:
    """Predicted energy of each expert, what :func:`_emitter` puts into the graph before the logarithm: [n, d] -> [n, E]."""
    z = F.linear(x, t["project"])
    h = ACTIVATIONS[view.activation](F.linear(z, t["expand"], t["expand_bias"])) * t["norms"]
    if view.gated:
        h = h * F.linear(z, t["times"], t["times_bias"])
    return h.square().unflatten(-1, (view.experts, -1)).sum(-1)


def _emitter(view: ExpertView) -> Emit:
    gated, activation, experts, neurons = view.gated, view.activation, view.experts, view.neurons

    def emit(b: Builder, x: fx.Node, read: Read) -> fx.Node:
        z = b.call(aten.linear.default, x, read("project"))
        h = emit_activation(b.call, activation, b.call(aten.linear.default, z, read("expand"), read("expand_bias")))
        h = b.call(aten.mul.Tensor, h, read("norms"))
        if gated:
            h = b.call(aten.mul.Tensor, h, b.call(aten.linear.default, z, read("times"), read("times_bias")))
        squares = b.call(aten.mul.Tensor, h, h)
        mass = b.call(aten.sum.dim_IntList, b.call(aten.unflatten.int, squares, -1, [experts, neurons]), [-1])
        m = b.call(aten.log.default, b.call(aten.add.Tensor, mass, read("floor")))
        return b.call(aten.cat.default, [x, m], -1)

    return emit
