"""Random kernels in context: each between a cheap producer and a consumer, many to one graph.

A kernel alone in a graph is measured with layout conversions and with a cache that it never has
inside a net. Here kernels stand in short chains of the blocks that nets are made of, and a graph
holds several chains, so that a kernel finds its weights evicted from the nearest cache, as in a
net.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nasfx.costs.calibration.builder import Builder, Value

# Nodes whose names start so only feed a chain: they read the graph's inputs, as no kernel does.
PRODUCER = "producer."
_ACTS = ("relu", "relu6", "hswish", "swish", "")
_GATES = ("hsigmoid", "hsigmoid", "sigmoid")
_MOST_MACS = 120e6  # longer operators are seldom left undisturbed


class _Draw:
    """Random sizes, biased to what nets have: many channels where the image is small."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def one_of(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def height(self, low: int = 5, high: int = 64) -> int:
        """Log-uniform; half the time a size that nets at 224 or 192 pixels have."""
        usual = [h for h in (6, 7, 12, 14, 24, 28, 48, 56, 96, 112) if low <= h <= high]
        if usual and self.rng.random() < 0.5:
            return int(self.rng.choice(usual))
        return round(math.exp(self.rng.uniform(math.log(low), math.log(high))))

    def channels(self, height: int, low: int = 8, high: int = 1024) -> int:
        """Log-uniform around 1500 / height; mostly a multiple of eight."""
        middle = 1500 / height
        least, most = sorted((max(low, middle / 6), min(high, middle * 6)))
        value = math.exp(self.rng.uniform(math.log(least), math.log(most)))
        step = self.one_of(2, 4, 8, 8, 16, 16)
        return max(step, step * round(value / step))


def _affordable(height: int, cin: int, cout: int, k: int) -> int:
    """`cout`, lowered where the convolution would take more than the most MACs allowed."""
    most = int(_MOST_MACS / (height * height * cin * k * k))
    return cout if cout <= most else max(8, most // 8 * 8)


def _start(net: Builder, height: int, channels: int) -> Value:
    scope, net.scope = net.scope, PRODUCER + net.scope
    x = net.conv(net.input(1, 16, height, height), channels, act="relu")
    net.scope = scope
    return x


def _end(net: Builder, x: Value) -> None:
    """A consumer that keeps the layout of convolutions, and a small output."""
    if len(x.shape) == 4 and x.height > 1:
        x = net.conv(x, 16)
    net.output(x)


def _conv(net: Builder, draw: _Draw) -> None:
    k, stride = draw.one_of(1, 1, 1, 3, 3, 3, 5, 7), draw.one_of(1, 1, 2)
    h = draw.height(high=80)
    cin = draw.channels(h)
    size = math.ceil(h / stride)
    cout = _affordable(size, cin, draw.channels(size), k)
    x = net.conv(_start(net, h, cin), cout, k, stride, act=draw.one_of(*_ACTS))
    _end(net, x)


def _stem(net: Builder, draw: _Draw) -> None:
    h = draw.height(32, 224) if draw.rng.random() < 0.5 else draw.one_of(160, 192, 224)
    k, stride = draw.one_of(3, 3, 5, 7), draw.one_of(1, 2, 2)
    size = math.ceil(h / stride)
    cout = _affordable(size, 3, draw.one_of(16, 24, 32, 48, 64), k)
    _end(net, net.conv(net.input(1, 3, h, h), cout, k, stride, act=draw.one_of(*_ACTS)))


def _mbconv(net: Builder, draw: _Draw) -> None:
    k, stride = draw.one_of(3, 3, 5, 7), draw.one_of(1, 1, 2)
    h = draw.height(high=112)
    c = draw.channels(h, high=320)
    hidden, act = c * draw.one_of(1, 2, 3, 4, 6), draw.one_of(*_ACTS)
    hidden = _affordable(h, c, hidden, 1)
    x = _start(net, h, c)
    y = net.conv(x, hidden, act=act) if hidden != c else x
    y = net.conv(y, hidden, k, stride, groups=hidden, act=act)
    if draw.rng.random() < 0.5:
        y = net.squeeze_excite(y, max(8, hidden // 4), draw.one_of(*_GATES))
    same = stride == 1 and draw.rng.random() < 0.7
    y = net.conv(y, c if same else _affordable(y.height, hidden, draw.channels(y.height), 1))
    _end(net, net.add(x, y) if same else y)


def _residual(net: Builder, draw: _Draw) -> None:
    h = draw.height(high=56)
    c = draw.channels(h, high=512)
    c = min(c, _affordable(h, c, 512, 3))
    x = _start(net, h, c)
    if draw.rng.random() < 0.5:
        y = net.conv(net.conv(x, c, 3, act="relu"), c, 3)
    else:
        y = net.conv(net.conv(net.conv(x, max(8, c // 4), act="relu"), max(8, c // 4), 3), c)
    if draw.rng.random() < 0.3:
        x = net.conv(x, c)
    x = net.act(net.add(x, y), draw.one_of("relu", "relu", ""))
    # Two readers, as within a net, where the next block's shortcut reads it too.
    _end(net, net.add(net.conv(x, c), x))


def _sum(net: Builder, draw: _Draw) -> None:
    """Sums and activations that follow no convolution directly, as in cells of pooled branches."""
    h = draw.height(high=64)
    c = draw.channels(h, high=512)
    x = _start(net, h, c)
    y, z = net.pool(x, "AveragePool", 3, 1), net.pool(x, "MaxPool", 3, 1)
    x = net.act(net.add(y, z), draw.one_of("relu", "", "relu6", "hswish", "swish"))
    x = net.conv(x, c, 3, groups=c)
    _end(net, net.conv(x, min(c, 64)))


def _shuffle(net: Builder, draw: _Draw) -> None:
    """A stage of shuffle units as it stands in nets: the first halves the image, others split."""
    h, k = draw.height(high=56), draw.one_of(3, 3, 5, 7)
    half = draw.channels(h, high=512)
    x = _start(net, h, 2 * half)
    left = net.conv(net.conv(x, x.channels, k, 2, groups=x.channels), half, act="relu")
    y = net.conv(net.conv(x, half, act="relu"), half, k, 2, groups=half)
    x = net.shuffle(net.concat(left, net.conv(y, half, act="relu")), 2)
    for _ in range(2):
        left, y = net.split(x)
        y = net.conv(net.conv(y, half, act="relu"), half, k, groups=half)
        x = net.shuffle(net.concat(left, net.conv(y, half, act="relu")), 2)
    _end(net, x)


def _grouped(net: Builder, draw: _Draw) -> None:
    groups, h = draw.one_of(2, 3, 4, 8), draw.height(high=56)
    c = groups * draw.channels(h, high=512 // groups)
    middle = groups * max(4, c // groups // draw.one_of(1, 2, 4))
    k, stride = draw.one_of(1, 1, 3), draw.one_of(1, 1, 2)
    x = _start(net, h, c)
    y = net.conv(x, middle, k, stride, groups=groups, act=draw.one_of("relu", "relu6", ""))
    if draw.rng.random() < 0.5:
        y = net.conv(net.shuffle(y, groups), middle, 3, groups=middle)
        y = net.conv(y, c, groups=groups)
    _end(net, net.act(net.add(x, y), "relu") if y.shape == x.shape else y)


def _pool(net: Builder, draw: _Draw) -> None:
    h = draw.one_of(draw.height(6, 56), draw.height(56, 224))
    c = min(draw.channels(h, 16, 512), round(2e6 / h**2))
    k, stride = draw.one_of((2, 2), (3, 2), (3, 2), (3, 1), (5, 1))
    x = net.pool(_start(net, h, c), draw.one_of("MaxPool", "AveragePool"), k, stride)
    _end(net, x)


def _concat(net: Builder, draw: _Draw) -> None:
    h, branches = draw.height(high=56), draw.one_of(2, 2, 3, 4)
    x = _start(net, h, draw.channels(h, high=256))
    sizes = [draw.channels(h, high=256) for _ in range(branches)]
    outs = [net.conv(x, _affordable(h, x.channels, c, 3), draw.one_of(1, 3)) for c in sizes]
    x = net.concat(*outs)
    if draw.rng.random() < 0.5:
        x = net.batch_norm(x)
        x = net.act(x, draw.one_of("relu", ""))
    else:
        x = net.act(x, draw.one_of("relu", "hswish", ""))
    _end(net, x)


def _normalised(net: Builder, draw: _Draw) -> None:
    h = draw.height(high=56)
    c = draw.channels(h, high=512)
    x = net.pool(_start(net, h, c), "MaxPool", 3, 1)
    x = net.act(net.batch_norm(x), draw.one_of("relu", "relu6", "hswish", ""))
    _end(net, net.conv(x, min(c, 64)))


def _gate(net: Builder, draw: _Draw) -> None:
    """Squeeze-and-excitation, alone or whose gate is also an output and so stays apart."""
    h = draw.height(high=56)
    c = draw.channels(h, high=512)
    x, gate = _start(net, h, c), draw.one_of(*_GATES)
    if draw.rng.random() < 0.5:
        x = net.squeeze_excite(x, max(8, c // draw.one_of(4, 16)), gate)
    else:
        x = net.mul(x, net.act(net.linear_gate(x), gate))
    _end(net, net.conv(x, c))


def _layout(net: Builder, draw: _Draw) -> None:
    """Reshapes and transpositions alone, as before a token mixer or a flat classifier."""
    h = draw.height(4, 28)
    c = draw.channels(h, high=256)
    x = _start(net, h, c)
    if draw.rng.random() < 0.5:
        # Not undone at once, as a runtime would cancel the two.
        x = net.reshape(net.transpose(x, 0, 2, 3, 1), 1, h * h, c)
        x = net.reshape(net.transpose(x, 0, 2, 1), 1, c, h, h)
    else:
        x = net.act(net.reshape(x, 1, c * h * h), draw.one_of("hsigmoid", "sigmoid"))
        x = net.reshape(x, 1, c, h, h)
    _end(net, x)


def _head(net: Builder, draw: _Draw) -> None:
    h = draw.height(4, 14)
    c = draw.channels(h, 64, 1536)
    x = _start(net, h, c)
    flat = draw.rng.random() < 0.2 and c * h * h <= 8192
    if not flat:
        if draw.rng.random() < 0.3:
            x = net.conv(x, min(1280, 3 * c), act=draw.one_of(*_ACTS))
        x = net.global_pool(x) if draw.rng.random() < 0.7 else net.mean(x)
    if draw.rng.random() < 0.4:
        x = net.linear(x, draw.one_of(64, 256, 512, 1280), act=draw.one_of("relu", "hswish"))
    net.output(net.linear(x, draw.one_of(10, 100, 200, 1000)))


Chain = Callable[[Builder, _Draw], None]

# How often each is drawn; convolutions decide most nets.
_SHARES: dict[Chain, int] = {
    _conv: 8,
    _stem: 3,
    _mbconv: 8,
    _residual: 6,
    _sum: 2,
    _shuffle: 4,
    _grouped: 4,
    _pool: 5,
    _concat: 3,
    _normalised: 2,
    _gate: 3,
    _layout: 2,
    _head: 4,
}


def draw_chains(seed: int, count: int) -> list[Chain]:
    """`count` kinds of chain by their shares, but every kind three times in any case.

    So there are three times as many as there are kinds, at least.
    """
    rng = np.random.default_rng(seed)
    order = [chain for chain, share in _SHARES.items() for _ in range(share)]
    chosen = [*_SHARES] * 3
    chosen += [order[int(i)] for i in rng.integers(len(order), size=max(0, count - len(chosen)))]
    return [chosen[int(i)] for i in rng.permutation(len(chosen))]


def build_chains(seed: int, chains: Sequence[Chain]) -> Any:
    """One ONNX graph of these chains, of random sizes, as an `onnx.ModelProto`."""
    net, draw = Builder(seed), _Draw(np.random.default_rng(seed))
    for index, chain in enumerate(chains):
        net.scope = f"chain{index}."
        chain(net, draw)
    return net.model()
