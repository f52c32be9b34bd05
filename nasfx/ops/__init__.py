"""What may stand in a lowered graph: gates, mixtures, sampled switches, and the stages' rules."""

from nasfx.ops.arch_state import ArchState as ArchState
from nasfx.ops.binary import BinaryGate as BinaryGate
from nasfx.ops.binary import InputBinaryGate as InputBinaryGate
from nasfx.ops.expectation import activity as activity
from nasfx.ops.expectation import drawn_gate as drawn_gate
from nasfx.ops.expectation import expected_cost as expected_cost
from nasfx.ops.expectation import scaled as scaled
from nasfx.ops.expectation import total_cost as total_cost
from nasfx.ops.expectation import uniform_gate as uniform_gate
from nasfx.ops.function import graph_function as graph_function
from nasfx.ops.gates import Gate as Gate
from nasfx.ops.gates import binary_gate as binary_gate
from nasfx.ops.gates import gumbel_logits as gumbel_logits
from nasfx.ops.gates import inclusion_gate as inclusion_gate
from nasfx.ops.gates import pair_gate as pair_gate
from nasfx.ops.gates import softmax_gate as softmax_gate
from nasfx.ops.mix import mix as mix
from nasfx.ops.select import Deferred as Deferred
from nasfx.ops.select import Demanded as Demanded
from nasfx.ops.select import InputSwitch as InputSwitch
from nasfx.ops.select import Switch as Switch
from nasfx.ops.select import demanded as demanded
from nasfx.ops.stages import CHOICE as CHOICE
from nasfx.ops.stages import SUBNET as SUBNET
from nasfx.ops.stages import SUPERNET as SUPERNET
