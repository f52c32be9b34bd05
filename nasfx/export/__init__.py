"""Back ends: a finished network as ONNX, as MNN, or as readable Python source."""

from nasfx.export.mnn import export_mnn as export_mnn
from nasfx.export.onnx import export_onnx as export_onnx
from nasfx.export.source import write_module as write_module
