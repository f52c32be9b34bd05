"""What networks cost: counted, expected over a space, predicted by nn-Meter, measured.

Where latencies come from is a `LatencySource`: `NnMeter`, `LatencyTable`, `Measured`, or a class of
your own with a `name` and `milliseconds(parts)`.
"""

from nasfx.costs.parts import Part
from nasfx.costs.sources import FunctionSource, LatencySource, Measured, NnMeter
from nasfx.costs.tables import LatencyTable

__all__ = ["FunctionSource", "LatencySource", "LatencyTable", "Measured", "NnMeter", "Part"]
