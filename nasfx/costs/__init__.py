"""What networks cost: counted by running them, predicted by nn-Meter, measured in runtimes."""

from nasfx.costs.count import Count as Count
from nasfx.costs.count import count as count
from nasfx.costs.profiling import Profile as Profile
from nasfx.costs.profiling import known_hardware as known_hardware
from nasfx.costs.profiling import profile as profile
from nasfx.costs.runtimes import mnn_milliseconds as mnn_milliseconds
from nasfx.costs.runtimes import onnxruntime_milliseconds as onnxruntime_milliseconds
