"""Latency predictors fitted on a runtime of this machine, and the measurements behind them."""

from nasfx.costs.calibration.accuracy import Accuracy, Calibration
from nasfx.costs.calibration.calibrating import QUICK, calibrate
from nasfx.costs.calibration.timing import Runtime, node_milliseconds

__all__ = ["QUICK", "Accuracy", "Calibration", "Runtime", "calibrate", "node_milliseconds"]
