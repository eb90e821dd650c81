"""Routers with a hidden layer."""

from __future__ import annotations

import torch
from dyncomp.passes.layerwise import Layer
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.routers.scores import Read, RouterOptions, Scores, targets
from torch import Tensor, fx

from dyncomp.graph import Builder

aten = torch.ops.aten
_EPOCHS, _BATCH, _RATE = 8, 512, 3e-3


def mlp(layer: Layer, options: RouterOptions) -> Scores:
    """``scores = linear(cat(x, relu(linear(x, V, c))), W, b)``: a hidden layer of ``rank`` neurons (the two-layer predictors of
    MoEfication, 2110.01786, and D2DMoE) beside the linear router.

    The hidden layer is trained by Adam together with a last layer; that one is then solved exactly, by ridge regression.
    """
    view = layer.view
    x = torch.cat([part.reshape(-1, view.d_model) for part in layer.inputs])
    wanted = torch.cat(targets(layer, options.target))
    scale = x.std(0).clamp_min(1e-6)
    hidden, bias = _train(x / scale, wanted - wanted.mean(0), options)
    hidden = hidden / scale
    problem = LeastSquares(view.d_model + options.rank, view.experts)
    for rows, target in zip(x.split(8192), wanted.split(8192), strict=True):
        problem.add(torch.cat([rows, torch.nn.functional.linear(rows, hidden, bias).relu()], 1), target)
    weight, last = problem.solve(options.ridge)
    return Scores(last, weight.T.contiguous(), {"hidden": hidden, "hidden_bias": bias}, _emit)


def _emit(builder: Builder, x: fx.Node, read: Read) -> fx.Node:
    h = builder.call(aten.relu.default, builder.call(aten.linear.default, x, read("hidden"), read("hidden_bias")))
    return builder.call(aten.cat.default, [x, h], -1)


def _train(x: Tensor, y: Tensor, options: RouterOptions) -> tuple[Tensor, Tensor]:
    """The hidden layer of an MLP that predicts y from x: (weight [rank, d], bias [rank])."""
    generator = torch.Generator().manual_seed(options.seed)
    width, d = options.rank, x.shape[1]
    first = torch.randn(width, d, generator=generator) / d**0.5
    parameters = [first, torch.zeros(width), torch.zeros(y.shape[1], width), torch.zeros(y.shape[1], d)]
    with torch.enable_grad():
        parameters = [p.requires_grad_() for p in parameters]
        steps = _EPOCHS * max(1, len(x) // _BATCH)
        adam = torch.optim.Adam(parameters, lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=generator)
            h = torch.nn.functional.linear(x[rows], parameters[0], parameters[1]).relu()
            predicted = h @ parameters[2].T + x[rows] @ parameters[3].T
            loss = (predicted - y[rows]).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return parameters[0].detach(), parameters[1].detach()
