"""The main job, end to end, on real digits: search, finalize, retrain, export, predict, measure.

Run by `make quickstart`. Data: the 1,797 handwritten digits (8x8) that scikit-learn ships. What is
written goes to quickstart-output/. The figures say that everything works; on data this small they
are no evidence of search quality.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nasfx
from nasfx import LayerChoice
from nasfx.costs.calibration import QUICK

OUTPUT = Path("quickstart-output")
SEARCH_EPOCHS, WARMUP_EPOCHS, RETRAIN_EPOCHS, BATCH = 20, 8, 6, 64
HARDWARE = OUTPUT / "this-machine"


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(channels: int, kernel: int) -> nn.Sequential:
    return Residual(
        nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
    )


def block(channels: int, label: str) -> LayerChoice:
    return LayerChoice(
        {
            "conv3": Residual(*conv(channels, channels, 3)),
            "conv5": Residual(*conv(channels, channels, 5)),
            "sep3": separable(channels, 3),
            "sep5": separable(channels, 5),
            "skip": nn.Identity(),
        },
        label=label,
    )


class DigitNet(nn.Module):
    """Four searched blocks: 5**4 = 625 subnets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 16, 3)
        self.block1 = block(16, "block1")
        self.block2 = block(16, "block2")
        self.down = conv(16, 32, 3, stride=2)
        self.block3 = block(32, "block3")
        self.block4 = block(32, "block4")
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block2(self.block1(self.stem(x)))
        x = self.block4(self.block3(self.down(x)))
        return self.head(x.mean((2, 3)))


def digits() -> dict[str, TensorDataset]:
    """Real digits, split 60/20/20 by a fixed permutation."""
    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 - 0.5)[order]
    y = torch.tensor(targets)[order]
    cuts = {"train": slice(0, 1078), "valid": slice(1078, 1438), "test": slice(1438, None)}
    return {name: TensorDataset(x[cut], y[cut]) for name, cut in cuts.items()}


def accuracy(outputs: torch.Tensor, target: torch.Tensor) -> float:
    return float((outputs.argmax(1) == target).float().mean())


def retrain(subnet: nn.Module, data: dict[str, TensorDataset]) -> float:
    """Train a subnet from the weights that it has; the test accuracy in percent."""
    loader = DataLoader(
        data["train"], BATCH, shuffle=True, generator=torch.Generator().manual_seed(1)
    )
    optimizer = torch.optim.SGD(subnet.parameters(), 0.05, 0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, RETRAIN_EPOCHS * len(loader))
    subnet.train()
    for _ in range(RETRAIN_EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(subnet(x), y).backward()
            optimizer.step()
            schedule.step()
    subnet.eval()
    with torch.no_grad():
        return 100 * accuracy(subnet(data["test"].tensors[0]), data["test"].tensors[1])


def measure(
    name: str, subnet: nn.Module, data: dict[str, TensorDataset], example: torch.Tensor
) -> dict[str, float]:
    """Retrain, export and time one subnet."""
    figures: dict[str, float] = {"test %": retrain(subnet, data)}
    count = nasfx.count(subnet, example)
    figures |= {"params": count.params, "MACs": count.flops}
    onnx_path = nasfx.export_onnx(subnet, OUTPUT / f"{name}.onnx", example)
    mnn_path = nasfx.export_mnn(onnx_path, OUTPUT / f"{name}.mnn")
    figures["predicted ORT ms"] = nasfx.profile(onnx_path, HARDWARE).milliseconds
    figures["ORT ms"] = nasfx.onnxruntime_milliseconds(onnx_path)
    figures["MNN ms"] = nasfx.mnn_milliseconds(mnn_path)
    return figures


def shown(rows: dict[str, dict[str, float]]) -> Table:
    """The closing table."""
    table = Table(
        title="batch 1, one thread, on this machine and not on a phone: predicted by the quick "
        "calibration, and measured in ONNX Runtime (ORT) and MNN"
    )
    table.add_column("subnet")
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    formats = {"test %": ".1f", "params": ",.0f", "MACs": ",.0f"}
    for name, figures in rows.items():
        cells = (format(v, formats.get(column, ".4f")) for column, v in figures.items())
        table.add_row(name, *cells)
    return table


def main() -> None:
    start = time.perf_counter()
    console = Console()
    OUTPUT.mkdir(exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the nets are too small for more to pay
    data = digits()
    example = data["train"].tensors[0][:1]

    model = DigitNet()
    net = nasfx.transform(model, strategy="proxyless", example_inputs=example)
    console.rule(f"a space of {net.space.size} subnets; block1 before and after the rewrites")
    console.print(nasfx.explain(net, "block1"), highlight=False, markup=False)
    console.rule("the passes")
    console.print(str(net.history), highlight=False, markup=False)

    console.rule("search")
    shuffled = torch.Generator().manual_seed(0)
    result = nasfx.search(
        net,
        DataLoader(data["train"], BATCH, shuffle=True, generator=shuffled),
        DataLoader(data["valid"], BATCH, shuffle=True, generator=shuffled),
        loss=F.cross_entropy,
        metric=accuracy,
        epochs=SEARCH_EPOCHS,
        warmup=WARMUP_EPOCHS,
        optimizers=(
            torch.optim.SGD(net.weight_parameters(), 0.05, 0.9),
            net.arch_optimizer(lr=0.05),
        ),
    )
    console.print(result.table())
    result.plot(OUTPUT / "search.png")
    result.architecture.to_json(OUTPUT / "architecture.json")

    console.rule("a latency predictor for ONNX Runtime on this machine, calibrated in seconds")
    generator = torch.Generator().manual_seed(7)
    random = [nasfx.finalize(net, net.space.sample(generator)) for _ in range(5)]
    space = [
        nasfx.export_onnx(subnet, OUTPUT / f"random{i}.onnx", example)
        for i, subnet in enumerate(random)
    ]
    calibration = nasfx.calibrate("onnxruntime", HARDWARE, space=space, **QUICK)
    console.print(calibration.table())

    console.rule("found, largest and five random subnets, each retrained with the same budget")
    found = nasfx.finalize(net, result.architecture)
    console.print(f"found: {found.architecture}")
    console.print(f"certificate: {found.certificate}")
    largest = dict.fromkeys(("block1", "block2", "block3", "block4"), "conv5")
    rows = {"found": measure("found", found, data, example)}
    nasfx.write_module(found, OUTPUT / "found")
    rows["largest"] = measure("largest", nasfx.finalize(net, largest), data, example)
    drawn = [measure(f"random{i}", subnet, data, example) for i, subnet in enumerate(random)]
    rows["mean of 5 random"] = {
        column: statistics.mean(figures[column] for figures in drawn) for column in drawn[0]
    }
    console.print(shown(rows))
    console.print(nasfx.profile(OUTPUT / "found.onnx", HARDWARE).table())
    console.print(f"written to {OUTPUT}/ in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
