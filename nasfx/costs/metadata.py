"""What the nodes of an exported ONNX file say about where they come from."""

from typing import Any

MODULE = "nasfx.module"
"""The key of the path of the user's module."""

CHOICE = "nasfx.choice"
"""The key of the choice that a node stands in and what was decided for it: "block: conv3"."""


def origin_entries(node: Any) -> dict[str, str]:
    """The entries under the two keys in the metadata of an `onnx.NodeProto`."""
    return {e.key: e.value for e in node.metadata_props if e.key in (MODULE, CHOICE)}
