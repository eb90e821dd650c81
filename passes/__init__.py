"""The passes. Importing this package registers them all by name (see :mod:`dyncomp.pipeline`)."""

# The folder stands at the top level of the repository but is the package `dyncomp.passes`: imported under another
# name it would be a second copy of every class.
if __name__ != "dyncomp.passes":
    raise ImportError(f"import this package as dyncomp.passes, not as {__name__!r}")

from dyncomp.passes.add_kv_cache import AddKVCache
from dyncomp.passes.awq import AWQ
from dyncomp.passes.carve_experts import CarveExperts
from dyncomp.passes.drop_depth import DropDepth
from dyncomp.passes.drop_experts import DropExperts
from dyncomp.passes.fit_router import FitRouter
from dyncomp.passes.fuse_norm import FuseNorm
from dyncomp.passes.heal import Heal
from dyncomp.passes.merge_experts import MergeExperts
from dyncomp.passes.prune_static import PruneStatic
from dyncomp.passes.quantize import Quantize
from dyncomp.passes.quantize_cache import QuantizeCache
from dyncomp.passes.recalibrate import Recalibrate
from dyncomp.passes.refit_down import RefitDown
from dyncomp.passes.skip_depth import SkipDepth
from dyncomp.passes.soft_moe import SoftMoE
from dyncomp.passes.sparsify import Sparsify
from dyncomp.passes.split_experts import SplitExperts
from dyncomp.passes.upcycle import Upcycle

__all__ = [
    "AWQ", "AddKVCache", "CarveExperts", "DropDepth", "DropExperts", "FitRouter", "FuseNorm", "Heal", "MergeExperts", "PruneStatic",
    "Quantize", "QuantizeCache", "Recalibrate", "RefitDown", "SkipDepth", "SoftMoE", "Sparsify", "SplitExperts", "Upcycle",
]  # fmt: skip
