"""Kernels that nn-Meter has no fitting features for, and nasfx's own predictors for them."""

import math
from collections.abc import Mapping
from typing import Any

# How the names of these predictors start. nn-Meter does not ask for them, and only a calibrated
# folder has them.
OWN = "nasfx-"


def groups_of(node: Any) -> int:
    """The groups of an ONNX Conv node."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def element_counts(model: Any) -> dict[str, float]:
    """The number of elements of each tensor that is computed or given."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}
    return {name: float(math.prod(shape)) for name, shape in shapes.items()}


def own_predictor(
    item: Mapping[str, Any], node: Any, sizes: Mapping[str, float]
) -> tuple[str, tuple[float, ...]]:
    """The name and features of a predictor of nasfx's own, which only calibrated folders hold.

    A grouped convolution is described as nn-Meter describes a dense one, with its groups; any other
    kernel by the elements that its first node reads and writes.
    """
    if node.op_type == "Conv":
        stride = item.get("strides", (1, 1))[1]
        row = (item["inputh"], item["cin"], item["cout"], item["ks"][1], stride, groups_of(node))
        return f"{OWN}gconv", tuple(map(float, row))
    read, written = (sum(sizes.get(n, 0) for n in names) for names in (node.input, node.output))
    return f"{OWN}{node.op_type.lower()}", (read, written)
