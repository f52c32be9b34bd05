"""Random nets of four families, to test predictors on nets that they were not fitted on."""

from collections.abc import Callable
from typing import Any

import numpy as np

from nasfx.costs.calibration.builder import Builder, Value

FAMILIES = ("mbconv", "shuffle", "resnet", "vgg")


def _one_of(rng: np.random.Generator, *options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _classifier(net: Builder, x: Value, hidden: int = 0) -> None:
    x = net.global_pool(x)
    if hidden:
        x = net.linear(x, hidden, act="relu")
    net.output(net.linear(x, 1000))


def _mbconv(net: Builder, rng: np.random.Generator, size: int) -> None:
    """As MobileNetV3 (Howard et al., 2019) and ProxylessNAS (Cai et al., 2019)."""
    act, gate = _one_of(rng, "relu6", "relu", "hswish"), _one_of(rng, "", "", "hsigmoid")
    width = _one_of(rng, 0.5, 0.75, 1.0, 1.3)

    def channels(c: int) -> int:
        return max(8, 8 * round(c * width / 8))

    x = net.conv(net.input(1, 3, size, size), channels(32), 3, 2, act=act)
    for c, stride in ((16, 1), (24, 2), (40, 2), (80, 2), (96, 1), (192, 2)):
        for layer in range(int(rng.integers(1, 5)) if stride == 2 else 1):
            k, expansion = _one_of(rng, 3, 5, 7), _one_of(rng, 3, 4, 6)
            hidden, out = x.channels * expansion, channels(c)
            y = net.conv(x, hidden, act=act)
            y = net.conv(y, hidden, k, stride if layer == 0 else 1, groups=hidden, act=act)
            if gate:
                y = net.squeeze_excite(y, max(8, hidden // 4), gate)
            y = net.conv(y, out)
            x = net.add(x, y) if y.shape == x.shape else y
    _classifier(net, net.conv(x, channels(1280), act=act))


def _shuffle(net: Builder, rng: np.random.Generator, size: int) -> None:
    """As ShuffleNetV2 (Ma et al., 2018) with the kernel sizes of SPOS (Guo et al., 2020)."""
    first = _one_of(rng, 48, 64, 116, 176)
    x = net.conv(net.input(1, 3, size, size), 24, 3, 2, act="relu")
    x = net.pool(x, "MaxPool", 3, 2)
    for c in (first, 2 * first, 4 * first):
        for layer in range(int(rng.integers(2, 7))):
            half, k = c // 2, _one_of(rng, 3, 5, 7)
            if layer == 0:
                left = net.conv(x, x.channels, k, 2, groups=x.channels)
                left = net.conv(left, half, act="relu")
                y = net.conv(x, half, act="relu")
            else:
                left, y = net.split(x)
                y = net.conv(y, half, act="relu")
            y = net.conv(y, half, k, 2 if layer == 0 else 1, groups=half)
            x = net.shuffle(net.concat(left, net.conv(y, half, act="relu")), 2)
    _classifier(net, net.conv(x, 1024, act="relu"))


def _resnet(net: Builder, rng: np.random.Generator, size: int) -> None:
    """As ResNet (He et al., 2016), with basic or bottleneck blocks."""
    width, bottleneck = _one_of(rng, 24, 32, 48, 64), rng.random() < 0.5
    x = net.conv(net.input(1, 3, size, size), width, 7, 2, act="relu")
    x = net.pool(x, "MaxPool", 3, 2)
    for stage in range(4):
        c = width * 2**stage
        for layer in range(int(rng.integers(1, 4))):
            stride = 2 if layer == 0 and stage else 1
            if bottleneck:
                y = net.conv(net.conv(x, c // 2, act="relu"), c // 2, 3, stride, act="relu")
                y = net.conv(y, 2 * c)
            else:
                y = net.conv(net.conv(x, c, 3, stride, act="relu"), c, 3)
            x = x if x.shape == y.shape else net.conv(x, y.channels, 1, stride)
            x = net.act(net.add(y, x), "relu")
    _classifier(net, x)


def _vgg(net: Builder, rng: np.random.Generator, size: int) -> None:
    """As VGG (Simonyan and Zisserman, 2015), narrower, with a pooled head."""
    width, x = _one_of(rng, 8, 16, 24, 32), net.input(1, 3, size, size)
    for stage in range(5):
        for _ in range(int(rng.integers(1, 4))):
            x = net.conv(x, width * 2 ** min(stage, 3), _one_of(rng, 3, 3, 5), act="relu")
        x = net.pool(x, "MaxPool", 2, 2)
    _classifier(net, x, hidden=512)


_BUILD: dict[str, Callable[[Builder, np.random.Generator, int], None]] = dict(
    zip(FAMILIES, (_mbconv, _shuffle, _resnet, _vgg), strict=True)
)


def random_net(family: str, seed: int) -> Any:
    """A random net of one of `FAMILIES`, as an `onnx.ModelProto` of random weights."""
    rng = np.random.default_rng((seed, FAMILIES.index(family)))
    net = Builder(seed)
    _BUILD[family](net, rng, int(_one_of(rng, 128, 160, 192, 224)))
    return net.model()
