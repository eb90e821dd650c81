"""Linear routers by ridge regression."""

from __future__ import annotations

from dyncomp.passes.layerwise import Layer
from dyncomp.passes.least_squares import LeastSquares
from dyncomp.passes.routers.scores import RouterOptions, Scores, targets


def ridge(layer: Layer, options: RouterOptions) -> Scores:
    """``scores = linear(x, W, b)``: ridge regression of the logarithm of each expert's output energy (or of its norm, the target
    of D2DMoE, 2310.04361) on x."""
    view = layer.view
    problem = LeastSquares(view.d_model, view.experts)
    for x, target in zip(layer.inputs, targets(layer, options.target), strict=True):
        if not options.bias:  # the order of a token's experts is all that counts: what they have in common need not be explained
            target = target - target[:, ~view.shared].mean(1, keepdim=True)
        problem.add(x.reshape(-1, view.d_model), target)
    weight, bias = problem.solve(options.ridge, bias=options.bias)
    return Scores(bias, weight.T.contiguous())
