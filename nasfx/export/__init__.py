"""Back ends: a finished network as ONNX, MNN, or readable Python source; its weights alone."""

from nasfx.export.mnn import export_mnn as export_mnn
from nasfx.export.onnx import export_onnx as export_onnx
from nasfx.export.source import write_module as write_module
from nasfx.export.weights import load_weights as load_weights
from nasfx.export.weights import save_weights as save_weights
