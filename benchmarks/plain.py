"""Supernets written by hand, which nasfx is compared with: plain PyTorch, nothing clever.

`Hand` is the search net of DARTS with the structure of the authors' code. `MixedNet` makes such
a net of any model whose choices are LayerChoices: each becomes a module that calls all of its
candidates and adds up their outputs.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from common import LEARNING_RATE, Step
from torch import Tensor, nn

import nasfx


def norm(c: int) -> nn.Module:
    return nn.BatchNorm2d(c, affine=False)


def conv_relu(c_in: int, c: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False), norm(c))


class Halve(nn.Module):
    def __init__(self, c_in: int, c: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.b = nn.Conv2d(c_in, c // 2, 1, 2, bias=False)
        self.norm = norm(c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.norm(torch.cat([self.a(x), self.b(x[:, :, 1:, 1:])], 1))


class Nothing(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0) if self.stride == 1 else x[:, :, ::2, ::2].mul(0.0)


def depthwise(c: int, k: int, stride: int, dilation: int) -> list[nn.Module]:
    pad = dilation * (k // 2)
    return [
        nn.ReLU(),
        nn.Conv2d(c, c, k, stride, pad, dilation, c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        norm(c),
    ]


def operations(c: int, s: int) -> nn.ModuleList:
    average = nn.AvgPool2d(3, s, 1, count_include_pad=False)
    return nn.ModuleList(
        [
            Nothing(s),
            nn.Sequential(nn.MaxPool2d(3, s, 1), norm(c)),
            nn.Sequential(average, norm(c)),
            nn.Identity() if s == 1 else Halve(c, c),
            nn.Sequential(*depthwise(c, 3, s, 1), *depthwise(c, 3, 1, 1)),
            nn.Sequential(*depthwise(c, 5, s, 1), *depthwise(c, 5, 1, 1)),
            nn.Sequential(*depthwise(c, 3, s, 2)),
            nn.Sequential(*depthwise(c, 5, s, 2)),
        ]
    )


def mixture(weights: Tensor, ops: nn.Module, x: Tensor) -> Tensor:
    terms = [w * op(x) for w, op in zip(weights, ops.children(), strict=True)]
    return functools.reduce(torch.add, terms)


class Cell(nn.Module):
    def __init__(self, c0: int, c1: int, c: int, reduces: bool, halved: bool) -> None:
        super().__init__()
        self.reduces = reduces
        self.pre0 = Halve(c0, c) if halved else conv_relu(c0, c)
        self.pre1 = conv_relu(c1, c)
        self.edges = nn.ModuleList(
            operations(c, 2 if reduces and j < 2 else 1) for i in range(4) for j in range(2 + i)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states = [self.pre0(s0), self.pre1(s1)]
        first = 0
        for _ in range(4):
            edges = [
                mixture(weights[first + j], self.edges[first + j], s) for j, s in enumerate(states)
            ]
            first += len(states)
            states.append(functools.reduce(torch.add, edges))
        return torch.cat(states[2:], 1)


class Hand(nn.Module):
    """The search net of DARTS: (N, 3, H, W) to (N, 10)."""

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__()
        c, c0, c1, halved = channels, 3 * channels, 3 * channels, False
        self.stem = nn.Sequential(nn.Conv2d(3, c0, 3, 1, 1, bias=False), nn.BatchNorm2d(c0))
        self.cells = nn.ModuleList()
        for i in range(cells):
            reduces = i in (cells // 3, 2 * cells // 3)
            c = 2 * c if reduces else c
            self.cells.append(Cell(c0, c1, c, reduces, halved))
            c0, c1, halved = c1, 4 * c, reduces
        self.head = nn.Linear(c1, 10)
        self.alphas = nn.ParameterList(1e-3 * torch.randn(14, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            weights = self.alphas[int(bool(cell.reduces))].softmax(-1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.head(s1.mean((2, 3)))


# -- of any model with LayerChoices ----------------------------------------------------------------


class Mixed(nn.Module):
    """The candidates of a choice, mixed with the softmax of its alphas."""

    def __init__(self, choice: nasfx.LayerChoice, label: str, alphas: nn.ParameterDict) -> None:
        super().__init__()
        self.ops = nn.ModuleList(op for _, op in choice.named_candidates())
        self.label = label
        # In a tuple, so that the parameters are those of the net alone.
        self.alphas = (alphas,)

    def forward(self, x: Tensor) -> Tensor:
        return mixture(self.alphas[0][self.label].softmax(-1), self.ops, x)


class MixedNet(nn.Module):
    """A model of which every choice is `Mixed`; choices of one label share their alphas."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.alphas = model, nn.ParameterDict()
        for path, choice in list(model.named_modules()):
            if isinstance(choice, nasfx.LayerChoice):
                label = choice.label or path.replace(".", "_")
                if label not in self.alphas:
                    self.alphas[label] = nn.Parameter(1e-3 * torch.randn(len(choice.candidates)))
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, Mixed(choice, label, self.alphas))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


# -- steps -----------------------------------------------------------------------------------------


def alphas_of(net: Hand | MixedNet) -> list[nn.Parameter]:
    return list(net.alphas.values() if isinstance(net, MixedNet) else net.alphas)


def search_steps(net: Hand | MixedNet, x: Tensor, y: Tensor, layout: torch.memory_format) -> Step:
    """A weight step and an arch step, each with its optimizer; both compute all gradients."""
    net.to(memory_format=layout)
    x = x.contiguous(memory_format=layout)
    alphas = alphas_of(net)
    weights = [p for p in net.parameters() if all(p is not a for a in alphas)]
    optimizers = [
        torch.optim.SGD(weights, LEARNING_RATE),
        torch.optim.Adam(alphas, 3e-4, betas=(0.5, 0.999), weight_decay=1e-3),
    ]

    def step() -> None:
        for optimizer in optimizers:
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            net.zero_grad()

    return step
