"""Routing families: small pure functions from scores to gates, one a file, each with its gradient.

==================  =========================================================  ==============================================
``top_k``           the k best experts of a token, weights summing to 1        Mixtral (2401.04088), Switch (2101.03961) at k = 1
``noisy``           noise on scores while training                             Shazeer et al. (1701.06538)
``groups``          top-k within a token's best groups of experts              DeepSeek-V3 (2412.19437): sigmoid, selection bias
``tree``            a router of groups, one of experts within them             Shazeer et al. (1701.06538, appendix B)
``parts``           top-k of experts, then a threshold on parts of them        two routers, see ``split-experts``
``hashed``          by token id, no router                                     Hash Layers (2106.04426)
``expert_choice``   each expert takes the tokens that score highest with it    Zhou et al. (2202.09368); not causal
``sinkhorn``        top-k of a balanced assignment                             BASE (2103.16716), S-BASE (2202.01169); not causal
``soft``            experts compute mixtures of tokens                         Soft MoE (2308.00951); not causal
``capacity``        tokens beyond an expert's capacity are dropped             GShard (2006.16668), Switch; dropless without
``balance``         losses, the bias without a loss, collapse                  Switch, ST-MoE (2202.08906), 2408.15664
==================  =========================================================  ==============================================

Graphs get them as plain ATen nodes (:meth:`dyncomp.graph.Builder.inline`): what trains is what is exported, and backends need no new
operators. For that they ask for no size but that of the last dimension. The gates that count experts by a threshold, and 0/1 gates of
the k best, are operators (:mod:`dyncomp.ops`).
"""

from dyncomp.routing.balance import balance_loss, bias_step, spread, z_loss
from dyncomp.routing.capacity import within_capacity
from dyncomp.routing.expert_choice import expert_choice
from dyncomp.routing.groups import deepseek_v3, deepseek_v3_parts, group_top_k, limit_to_groups
from dyncomp.routing.hashed import hash_table
from dyncomp.routing.noisy import noisy
from dyncomp.routing.parts import parts_of
from dyncomp.routing.sinkhorn import sinkhorn, sinkhorn_top_k
from dyncomp.routing.soft import soft
from dyncomp.routing.top_k import tempered_top_k, top_k
from dyncomp.routing.tree import tree

__all__ = [
    "balance_loss", "bias_step", "deepseek_v3", "deepseek_v3_parts", "expert_choice", "group_top_k", "hash_table", "limit_to_groups",
    "noisy", "parts_of", "sinkhorn", "sinkhorn_top_k", "soft", "spread", "tempered_top_k", "top_k", "tree", "within_capacity", "z_loss",
]  # fmt: skip
