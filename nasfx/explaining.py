"""`explain`: one choice through every pass."""

from __future__ import annotations

from nasfx.errors import SpaceError
from nasfx.rewriting.graph import provenance
from nasfx.supernet import Supernet


def explain(net: Supernet, label: str) -> str:
    """What became of the choice `label`, pass by pass, as text.

    Shows the nodes that belong to the choice in the traced graph and after every pass that changed
    them.

    Raises:
        SpaceError: there is no such label.

    Example:
        >>> # print(nasfx.explain(net, "block"))
    """
    labels = [choice.label for choice in net.space.choices]
    if label not in labels:
        raise SpaceError(f"no choice has the label {label!r}; the labels are {labels}")
    choice = net.space[label]
    sites = sorted({provenance(n).site for n in net.graph.nodes if provenance(n).label == label})
    parts = [f"choice {label!r}: {', '.join(map(str, choice.candidates))}"]
    parts += [f"  at {place}" for place in choice.places]
    parts += [f"  called from {site}" for site in sites if site]
    before: list[str] = []
    for i, record in enumerate(net.history.records):
        lines = [line.text for line in net.history.lines(i) if line.label == label]
        if lines != before:
            parts += ["", f"after {record.name}:" if i else "as traced:"]
            parts += [f"  {line}" for line in lines]
            before = lines
    return "\n".join(parts)
