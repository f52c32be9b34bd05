"""Which pairs of operators a runtime runs as one, found by trying."""

from typing import Any

from nasfx.costs.calibration.builder import Builder, Value
from nasfx.costs.calibration.timing import Runtime, node_milliseconds

# nn-Meter's names, as its rule files spell them; "relu" is also a clip.
_HEADS = ("conv", "dwconv", "bn", "add", "fc")
_TAILS = ("relu", "hswish", "hardsigmoid", "Sigmoid", "add")
# nn-Meter has features for the kernels that these make, and for no others.
_PAIRS = [(h, t) for h in ("conv", "dwconv") for t in _TAILS] + [
    (h, "relu") for h in ("bn", "add", "fc")
]
_CHANNELS, _HEIGHT = 64, 28


def _head(net: Builder, kind: str) -> tuple[Value, Value]:
    """The output of a node of this kind, and another tensor of its shape."""
    if kind == "fc":
        x = net.linear(net.input(1, _CHANNELS), 4096)
        return x, x
    x = net.conv(net.input(1, 16, _HEIGHT, _HEIGHT), _CHANNELS)
    x, other = net.pool(x, "MaxPool", 3, 1), net.pool(x, "AveragePool", 3, 1)
    if kind == "bn":
        return net.batch_norm(x), other
    if kind == "add":
        return net.add(x, other), x
    return net.conv(x, _CHANNELS, 3, groups=_CHANNELS if kind == "dwconv" else 1), other


def fusion_rules(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """nn-Meter's fusion rules as the runtime has them, in the form of its fusion_rules.json.

    A pair is fused if the runtime spends no time on its second node. Batch norm after a convolution
    is folded into it when a model is exported.
    """
    net = Builder()
    tails: dict[str, str] = {}
    acts = {"hardsigmoid": "hsigmoid", "Sigmoid": "sigmoid"}
    for head, tail in _PAIRS:
        net.scope = f"{head}_{tail}."
        x, other = _head(net, head)
        y = net.add(x, other) if tail == "add" else net.act(x, acts.get(tail, tail))
        tails[f"BF_{head}_{tail}"] = y.name.removesuffix(".out0")
        net.output(y if head == "fc" else net.conv(y, 16))
    took = node_milliseconds(net.model(), runtime, repeats=10)
    rules: dict[str, Any] = {name: {"obey": took[node] == 0} for name, node in tails.items()}
    rules |= {f"BF_{head}_bn": {"obey": True} for head in ("conv", "dwconv")}
    # A node with two readers is fused with neither.
    return {"MON": {"obey": 0}, "FN": {"obey": True}, "RT": {"obey": False}, **rules}
