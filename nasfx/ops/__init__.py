"""What may stand in a lowered graph: gates, mixtures, sampled switches, and the stages' rules."""

from nasfx.ops.arch_state import ArchState as ArchState
from nasfx.ops.binary import BinaryGate as BinaryGate
from nasfx.ops.binary import InputBinaryGate as InputBinaryGate
from nasfx.ops.function import graph_function as graph_function
from nasfx.ops.gates import Gate as Gate
from nasfx.ops.gates import binary_gate as binary_gate
from nasfx.ops.gates import inclusion_gate as inclusion_gate
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
