"""nasfx: a graph-rewriting compiler for neural architecture search, built on torch.fx.

Mark choices in a model with `LayerChoice` and `InputChoice`, `transform` it for a strategy,
`search`, `finalize` the result and export it. See the README for the whole in twenty lines.
"""

import importlib
from typing import TYPE_CHECKING, Any

from nasfx.architecture import Architecture
from nasfx.choice import InputChoice, LayerChoice, activated
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
from nasfx.strategies import Darts, Proxyless, SinglePath
from nasfx.subnet import finalize
from nasfx.supernet import Supernet, transform
from nasfx.tracing import TracedModel, trace

if TYPE_CHECKING:
    from nasfx.costs import (
        Count,
        Profile,
        count,
        known_hardware,
        mnn_milliseconds,
        onnxruntime_milliseconds,
        profile,
    )
    from nasfx.export import export_mnn, export_onnx, write_module
    from nasfx.searching import SearchResult, evolve, search

__version__ = "0.1.0"

# Imported at first use: Lightning, ONNX, MNN and nn-Meter take seconds, or may not be installed.
_LAZY = {
    "nasfx.costs": (
        "Count", "Profile", "count", "known_hardware", "mnn_milliseconds",
        "onnxruntime_milliseconds", "profile",
    ),
    "nasfx.export": ("export_mnn", "export_onnx", "write_module"),
    "nasfx.searching": ("SearchResult", "evolve", "search"),
}  # fmt: skip
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "Architecture",
    "CheckpointError",
    "Count",
    "Darts",
    "ExportError",
    "InputChoice",
    "LayerChoice",
    "NasfxError",
    "PassError",
    "Profile",
    "ProfileError",
    "Proxyless",
    "SearchError",
    "SearchResult",
    "SearchSpace",
    "SinglePath",
    "SpaceError",
    "Supernet",
    "TraceError",
    "TracedModel",
    "VerifyError",
    "activated",
    "count",
    "evolve",
    "explain",
    "export_mnn",
    "export_onnx",
    "finalize",
    "known_hardware",
    "mnn_milliseconds",
    "onnxruntime_milliseconds",
    "profile",
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
