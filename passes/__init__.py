"""The passes of nasfx, one file each; installed and imported as `nasfx.passes`."""

if __name__ != "nasfx.passes":
    raise ImportError("import nasfx.passes; the folder passes/ is installed under that name")

from nasfx.passes.annotate_cost import AnnotateCost as AnnotateCost
from nasfx.passes.canonicalize import Canonicalize as Canonicalize
from nasfx.passes.cheapen_depthwise import CheapenDepthwise as CheapenDepthwise
from nasfx.passes.cheapen_pools import CheapenPools as CheapenPools
from nasfx.passes.collapse_choices import CollapseChoices as CollapseChoices
from nasfx.passes.count_batches_once import CountBatchesOnce as CountBatchesOnce
from nasfx.passes.defer_producers import DeferProducers as DeferProducers
from nasfx.passes.drop_zero_candidates import DropZeroCandidates as DropZeroCandidates
from nasfx.passes.fold_gates_into_norms import FoldGatesIntoNorms as FoldGatesIntoNorms
from nasfx.passes.fold_linear_candidates import FoldLinearCandidates as FoldLinearCandidates
from nasfx.passes.functionalize_inplace import FunctionalizeInplace as FunctionalizeInplace
from nasfx.passes.infer_shapes import InferShapes as InferShapes
from nasfx.passes.lower_binary_gate import LowerBinaryGate as LowerBinaryGate
from nasfx.passes.lower_gumbel_sum import LowerGumbelSum as LowerGumbelSum
from nasfx.passes.lower_sampled_path import LowerSampledPath as LowerSampledPath
from nasfx.passes.lower_weighted_sum import LowerWeightedSum as LowerWeightedSum
from nasfx.passes.propagate_channels_last import PropagateChannelsLast as PropagateChannelsLast
from nasfx.passes.remove_dead_code import RemoveDeadCode as RemoveDeadCode
from nasfx.passes.share_norms import ShareNorms as ShareNorms
from nasfx.passes.share_subexpressions import ShareSubexpressions as ShareSubexpressions
