"""Balanced assignment: scores are shifted until every expert is wanted by as many tokens."""

from __future__ import annotations

from torch import Tensor

from dyncomp.ops import topk_gates


def sinkhorn(scores: Tensor, steps: int = 8) -> Tensor:
    """Logarithm of the plan nearest to ``scores`` in which every token has mass 1 and every expert the same: [..., S, E] -> [..., S, E].

    Sinkhorn's iteration (Clark et al., 2202.01169, section 2.2), the entropy-regularised form of the assignment that BASE (2103.16716)
    solves by auction. It looks at all tokens of a sequence, those that follow included, so it cannot decode. Padding takes part.
    """
    for _ in range(steps):
        scores = scores - scores.logsumexp(-2, keepdim=True)
        scores = scores - scores.logsumexp(-1, keepdim=True)
    return scores


def sinkhorn_top_k(scores: Tensor, k: int, steps: int = 8) -> Tensor:
    """1 for the ``k`` experts with the most mass of each token's plan: [..., S, E] -> [..., S, E]; straight-through gradient.

    A thousandth of the scores decides between equals: a single token's plan is the same for every expert.
    """
    return topk_gates(sinkhorn(scores, steps) + 1e-3 * scores, k)
