"""A tree of routers: one chooses groups, one in each group its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from dyncomp.routing.groups import within_best
from dyncomp.routing.top_k import top_k


def tree(coarse: Tensor, scores: Tensor, k: int, kept: int) -> Tensor:
    """The ``k`` most likely experts of each token in its ``kept`` likeliest groups: [..., G], [..., E] -> [..., E], rows sum to 1.

    An expert is as likely as its group, times what it is in its group (hierarchical mixtures: Jordan and Jacobs, 1994; Shazeer et al.,
    1701.06538, appendix B); the weights are renormalised over those that run.
    """
    groups = coarse.shape[-1]
    members = torch.stack(scores.split(scores.shape[-1] // groups, -1), -2).log_softmax(-1)  # [..., G, E / G]
    return top_k(within_best(members + coarse.log_softmax(-1).unsqueeze(-1), coarse, kept), k)
