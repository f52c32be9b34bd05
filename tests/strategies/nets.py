"""Small float64 nets with choices, and what the tests of strategies compute for themselves."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import nasfx
from nasfx import InputChoice, LayerChoice, Supernet
from nasfx.choice import named_choices

STRATEGIES = ("darts", "fbnet", "proxyless", "enas", "single-path", "random")
SAMPLED = ("proxyless", "enas", "single-path", "random")
WIDTH = 4


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def dense(*, norm: bool = False, act: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(WIDTH, WIDTH)]
    if norm:
        layers.append(nn.BatchNorm1d(WIDTH))
    if act:
        layers.append(nn.Tanh())
    return nn.Sequential(*layers)


def ops(label: str | None) -> LayerChoice:
    return LayerChoice(
        {"lin": nn.Linear(WIDTH, WIDTH), "deep": dense(), "skip": nn.Identity()}, label=label
    )


class Chain(nn.Module):
    """Two choices after each other; 9 subnets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.first = ops("first")
        self.second = LayerChoice({"bn": dense(norm=True), "wide": dense(), "halved": Scale(0.5)})
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(torch.tanh(self.stem(x)))))


class Nested(nn.Module):
    """A choice inside a candidate, one directly as a candidate, and a tied label; 20 subnets."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.outer = LayerChoice(
            {
                "plain": nn.Linear(WIDTH, WIDTH),
                "holds": nn.Sequential(
                    LayerChoice([nn.Linear(WIDTH, WIDTH), nn.Tanh()], label="inner"),
                    nn.Linear(WIDTH, WIDTH),
                ),
                "direct": LayerChoice({"a": dense(), "b": Scale(-0.7)}, label="direct"),
            },
            label="outer",
        )
        self.one = LayerChoice({"u": dense(), "v": Scale(0.8)}, label="tied")
        self.two = LayerChoice({"u": dense(), "v": nn.Linear(WIDTH, WIDTH)}, label="tied")
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.outer(torch.tanh(self.stem(x)))
        return self.head(self.two(torch.tanh(self.one(x) + x)))


class Skips(nn.Module):
    """An input choice over four tensors; only some of them come from choices."""

    def __init__(self, n_chosen: int | None = 2, reduction: str = "sum") -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.block = ops("block")
        self.layers = nn.ModuleList(dense() for _ in range(2))
        self.pick = InputChoice(4, n_chosen, reduction=reduction, label="pick")
        self.reduction = reduction
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        picked = self.pick([x, self.block(x), *(layer(x) for layer in self.layers)])
        if self.reduction == "none":
            picked = picked[0] * 2
        elif self.reduction == "concat":
            picked = picked[:, :WIDTH] - picked[:, -WIDTH:]
        return self.head(torch.tanh(picked))


class Cell(nn.Module):
    """A DARTS cell: two nodes over edges with a `none`; every edge is a choice of its own."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.edges = nn.ModuleDict()
        self.nodes = nn.ModuleList()
        for node, inputs in ((1, 2), (2, 3)):
            for i in range(inputs):
                self.edges[f"{node}_{i}"] = LayerChoice(
                    {"none": Zero(), "lin": nn.Linear(WIDTH, WIDTH), "act": dense()},
                    label=f"{node}<-{i}",
                    relaxed_only=("none",),
                )
            self.nodes.append(
                InputChoice(inputs, n_chosen=2, reduction=reduction, label=f"node{node}")
            )
        self.head = nn.Linear(2 * WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        states = [x, x * 0.5]
        for node, pick in enumerate(self.nodes, 1):
            states.append(pick([self.edges[f"{node}_{i}"](s) for i, s in enumerate(states)]))
        return self.head(torch.cat(states[2:], 1))


class Norms(nn.Module):
    """Every candidate has a batch norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.block = LayerChoice(
            {"a": dense(norm=True), "b": dense(norm=True), "c": dense(norm=True, act=False)},
            label="block",
        )
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)))


def built(kind: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`kind()` in float64, with weights that only depend on `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double()


def batch(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 2, generator=generator, dtype=torch.float64)


def loss_of(net: Any, x: Tensor, y: Tensor) -> Tensor:
    """Not linear in the net's output."""
    return ((net(x) - y) ** 2).mean()


def spread(net: Supernet, seed: int = 0, scale: float = 1.0) -> None:
    """Give the architecture parameters values that are far from equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.arch_parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def drawn(net: Supernet) -> dict[str, Any]:
    """The drawn decision of every label, inactive ones included, as the state_dict holds it."""
    found: dict[str, Any] = {}
    for key, value in net.state_dict().items():
        if key.startswith("arch.state.path."):
            choice = net.space[key.removeprefix("arch.state.path.")]
            indices = value.tolist()
            names = [c for c in choice.candidates if c not in choice.relaxed_only]
            found[choice.label] = names[indices[0]] if choice.kind == "layer" else tuple(indices)
    return found


def set_draw(net: Supernet, decisions: Mapping[str, Any]) -> None:
    """Make `decisions` the drawn path, through the state_dict."""
    state = net.state_dict()
    for label, value in decisions.items():
        choice = net.space[label]
        names = [c for c in choice.candidates if c not in choice.relaxed_only]
        indices = [names.index(value)] if choice.kind == "layer" else list(value)
        state[f"arch.state.path.{label}"] = torch.tensor(indices, dtype=torch.int64)
    net.load_state_dict(state)


def paths_of(model: nn.Module, label: str) -> list[str]:
    return [
        path
        for path, choice in named_choices(model)
        if (choice.label or path.replace(".", "/")) == label
    ]


def with_gradient(model: nn.Module) -> tuple[set[str], set[str]]:
    """The parameters that have a gradient, and those that have one that is not zero."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return set(grads), {n for n, grad in grads.items() if bool(grad.any())}


def on_path(model: nn.Module, arch: Mapping[str, Any]) -> tuple[set[str], set[str]]:
    """The parameters to which the eager model gives a gradient, and one that is not zero."""
    parameters = dict(model.named_parameters())
    kept = {name: p.grad for name, p in parameters.items()}
    flags = {name: p.requires_grad for name, p in parameters.items()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        for p in parameters.values():
            p.grad = None
            p.requires_grad_(True)
        x, y = batch(99)
        with nasfx.activated(model, arch):
            loss_of(model, x, y).backward()
        return with_gradient(model)
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
            p.requires_grad_(flags[name])
        for name, b in model.named_buffers():
            b.copy_(buffers[name])


def subset_probabilities(alpha: Tensor, n_chosen: int | None) -> Tensor:
    """The probability that each input is chosen, by going through all subsets."""
    n = len(alpha)
    sizes = range(n + 1) if n_chosen is None else (n_chosen,)
    subsets = [s for k in sizes for s in itertools.combinations(range(n), k)]
    scores = torch.stack([alpha[list(s)].sum() for s in subsets])
    p = torch.softmax(scores, 0)
    return torch.stack(
        [sum(q for q, s in zip(p, subsets, strict=True) if i in s) for i in range(n)]
    )


@contextmanager
def watched(module: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], Any]]]:
    """(arguments, output) of every call of `module` within the block; outputs keep gradients."""
    calls: list[tuple[tuple[Any, ...], Any]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        output = output.view_as(output)  # an identity's output is its input, which others read
        if not output.requires_grad:  # no input was chosen
            output.requires_grad_()
        output.retain_grad()
        calls.append((args, output))
        return output

    handle = module.register_forward_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def _by_weight(inputs: list[Tensor], choice: InputChoice) -> list[Tensor]:
    """The derivative of the reduction by the weight of each input, at weights 0 and 1."""
    if choice.reduction == "sum" or not choice.active:
        return inputs
    k = len(choice.active)
    if choice.n_chosen is not None:  # their sum is always k
        return [x / k for x in inputs]
    mean = sum(inputs[i] for i in choice.active) / k
    return [(x - mean) / k for x in inputs]


def gate_gradients(
    model: nn.Module, decisions: Mapping[str, Any], x: Tensor, y: Tensor
) -> dict[str, Tensor]:
    """b by label: <o_k(x), dL/do> for every candidate, each from a forward pass of its own.

    `decisions` holds inactive labels too: they say what runs inside a candidate off the path.
    """
    found: dict[str, Tensor] = {}
    with nasfx.activated(model, decisions), ExitStack() as stack:
        choices = [
            (choice.label or path.replace(".", "/"), choice)
            for path, choice in named_choices(model)
        ]
        calls = [(label, c, stack.enter_context(watched(c))) for label, c in choices]
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        loss_of(model, x, y).backward()
        for label, choice, made in [(a, b, list(c)) for a, b, c in calls]:
            for args, output in made:
                if output.grad is None:
                    continue
                if isinstance(choice, LayerChoice):
                    values = [choice._modules[name](*args) for name in choice.choosable]
                else:
                    values = _by_weight(args[0], choice)
                b = torch.stack([(v * output.grad).sum().detach() for v in values])
                found[label] = found.get(label, torch.zeros_like(b)) + b
        for name, b in model.named_buffers():
            b.copy_(buffers[name])
    model.zero_grad()
    return found
