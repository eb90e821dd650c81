"""Routers: small graphs ``x -> scores`` beside a routed FFN, one family a file.

==================  ==========================================================================================  ==============
``ridge``           linear, fitted to what each expert gives                                                    D2DMoE's target
``mlp``             a hidden layer beside the linear one, fitted likewise                                       MoEfication
``neuron``          every neuron's activation from a low-rank product, summed up to its expert, then ``ridge``  DejaVu, PowerInfer
``spectral``        the energies of an expert's gate and up rows on x, in low rank; no regression               spectral mass
``mean-gate``       linear, the mean gate row of an expert's neurons; nothing fitted                            ExpertWeaver
``representative``  the activation of the neuron nearest to an expert's mean; nothing fitted                    CMoE
==================  ==========================================================================================  ==============

Each family is a function ``(layer, RouterOptions) -> Scores``; :func:`install` puts its sub-graph before the gates.
"""

from __future__ import annotations

from collections.abc import Callable

from dyncomp.passes.layerwise import Layer
from dyncomp.passes.routers.analytic import mean_gate, representative, spectral
from dyncomp.passes.routers.mlp import mlp
from dyncomp.passes.routers.neuron import neuron
from dyncomp.passes.routers.ridge import ridge
from dyncomp.passes.routers.scores import Biased, RouterOptions, Scores, install

FAMILIES: dict[str, Callable[[Layer, RouterOptions], Scores]] = {
    "ridge": ridge,
    "mlp": mlp,
    "neuron": neuron,
    "spectral": spectral,
    "mean-gate": mean_gate,
    "representative": representative,
}

__all__ = ["FAMILIES", "Biased", "RouterOptions", "Scores", "install"]
