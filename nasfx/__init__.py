"""nasfx: a graph-rewriting compiler for neural architecture search, built on torch.fx.

Mark choices in a model with `LayerChoice` and `InputChoice`, `transform` it for a strategy,
`search`, `finalize` the result and export it. See the README for the whole in twenty lines.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nasfx.architecture import Architecture
from nasfx.choice import InputChoice, LayerChoice, activated
from nasfx.costing import Cost, cost, latency_table
from nasfx.costs.latency import Latency
from nasfx.costs.objectives import CustomCost, Flops, Objective, Params
from nasfx.errors import (
    CheckpointError,
    ExportError,
    NasfxError,
    PassError,
    ProfileError,
    SearchError,
    SpaceError,
    TraceError,
    VerifyError,
)
from nasfx.explaining import explain
from nasfx.space import SearchSpace, search_space
from nasfx.strategies import Darts, Enas, FBNet, Proxyless, RandomSearch, SinglePath
from nasfx.subnet import finalize
from nasfx.supernet import Supernet
from nasfx.tracing import TracedModel, trace
from nasfx.transforming import transform

if TYPE_CHECKING:
    from nasfx.costs.calibration import Calibration, calibrate
    from nasfx.costs.count import Count, count
    from nasfx.costs.profiling import Profile, known_hardware, profile
    from nasfx.costs.runtimes import mnn_milliseconds, onnxruntime_milliseconds
    from nasfx.export import (
        export_mnn,
        export_onnx,
        load_weights,
        save_weights,
        write_module,
    )
    from nasfx.searching import Front, SearchResult, evolve, pareto, search
    from nasfx.trainers import (
        BaseOneShotTrainer,
        DartsTrainer,
        EnasTrainer,
        FBNetTrainer,
        LookUpTable,
        NASConfig,
        ProxylessTrainer,
        SinglePathTrainer,
        replace_input_choice,
        replace_layer_choice,
    )

__version__ = "0.1.0"

# Imported at first use: Lightning, ONNX, MNN and nn-Meter take seconds, or may not be installed.
_LAZY = {
    "nasfx.costs.calibration": ("Calibration", "calibrate"),
    "nasfx.costs.count": ("Count", "count"),
    "nasfx.costs.profiling": ("Profile", "known_hardware", "profile"),
    "nasfx.costs.runtimes": ("mnn_milliseconds", "onnxruntime_milliseconds"),
    "nasfx.export": (
        "export_mnn", "export_onnx", "load_weights", "save_weights", "write_module",
    ),
    "nasfx.trainers": (
        "BaseOneShotTrainer", "DartsTrainer", "EnasTrainer", "FBNetTrainer", "LookUpTable",
        "NASConfig", "ProxylessTrainer", "SinglePathTrainer", "replace_input_choice",
        "replace_layer_choice",
    ),
    "nasfx.searching": ("Front", "SearchResult", "evolve", "pareto", "search"),
}  # fmt: skip
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Architecture",
    "BaseOneShotTrainer",
    "Calibration",
    "CheckpointError",
    "Cost",
    "Count",
    "CustomCost",
    "Darts",
    "DartsTrainer",
    "Enas",
    "EnasTrainer",
    "ExportError",
    "FBNet",
    "FBNetTrainer",
    "Flops",
    "Front",
    "InputChoice",
    "Latency",
    "LayerChoice",
    "LookUpTable",
    "NASConfig",
    "NasfxError",
    "Objective",
    "Params",
    "PassError",
    "Profile",
    "ProfileError",
    "Proxyless",
    "ProxylessTrainer",
    "RandomSearch",
    "SearchError",
    "SearchResult",
    "SearchSpace",
    "SinglePath",
    "SinglePathTrainer",
    "SpaceError",
    "Supernet",
    "TraceError",
    "TracedModel",
    "VerifyError",
    "activated",
    "calibrate",
    "cost",
    "count",
    "evolve",
    "explain",
    "export_mnn",
    "export_onnx",
    "finalize",
    "known_hardware",
    "latency_table",
    "load_weights",
    "mnn_milliseconds",
    "onnxruntime_milliseconds",
    "pareto",
    "profile",
    "replace_input_choice",
    "replace_layer_choice",
    "save_weights",
    "search",
    "search_space",
    "trace",
    "transform",
    "write_module",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nasfx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
