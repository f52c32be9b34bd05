"""Small models with choices that several test files share, and random ones.

All of them but `Symbolic` ones take `example()`: a batch of two with four channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from nasfx import InputChoice, LayerChoice

CHANNELS = 4


def example(seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, CHANNELS, 5, 5, generator=generator, dtype=dtype)


def conv(kernel: int = 3) -> nn.Module:
    return nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2)


def conv_bn(kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, CHANNELS, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(CHANNELS),
        nn.ReLU(),
    )


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0


class Block(nn.Module):
    """One choice between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn()
        self.block = LayerChoice(
            {"conv3": conv_bn(3), "conv5": conv_bn(5), "skip": nn.Identity()}, label="block"
        )
        self.head = nn.Linear(CHANNELS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


class Inner(nn.Module):
    """A candidate that holds a choice and reads its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.conv(x))


class Nested(nn.Module):
    """A choice in a candidate, and a candidate that is itself a choice: 2 + 2 + 1 subnets."""

    def __init__(self) -> None:
        super().__init__()
        direct = LayerChoice({"k1": conv(1), "k3": conv(3)}, label="kernel")
        self.outer = LayerChoice(
            {"inner": Inner(), "direct": direct, "skip": nn.Identity()}, label="outer"
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x)


class Tied(nn.Module):
    """Two choices that are one decision, over weights of their own; and an unlabelled one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = LayerChoice({"conv": conv(), "relu": nn.ReLU()}, label="tied")
        self.two = LayerChoice({"conv": conv(), "relu": nn.Tanh()}, label="tied")
        self.free = nn.Sequential(LayerChoice([conv(1), nn.Sigmoid()]))

    def forward(self, x: Tensor) -> Tensor:
        return self.free(self.two(self.one(x)))


class Repeated(nn.Module):
    """One choice called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.block = LayerChoice({"conv": conv_bn(), "tanh": nn.Tanh()}, label="block")

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.block(self.block(y) + x)


class Blend(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        self.conv, self.sign = conv(), sign

    def forward(
        self, x: Tensor, pair: tuple[Tensor, dict[str, Tensor]], scale: float, *, shift: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        first, rest = pair
        y = self.conv(x) * scale + self.sign * first
        return y, {"shifted": rest["z"] + shift, "plain": y - self.sign}


class Arguments(nn.Module):
    """A choice called with nested arguments, a constant and a keyword; it gives a structure."""

    def __init__(self) -> None:
        super().__init__()
        self.blend = LayerChoice({"plus": Blend(1.0), "minus": Blend(-1.0)}, label="blend")

    def forward(self, x: Tensor) -> dict[str, Any]:
        y, more = self.blend(x, (x + 1, {"z": x * 2}), 0.5, shift=x.sin())
        return {"y": y, "rest": (more["shifted"], [more["plain"]])}


class Inputs(nn.Module):
    """Three producers, of which two are summed; any subset of three is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first = LayerChoice({"conv": conv(), "relu": nn.ReLU()}, label="first")
        self.second = conv_bn()
        self.third = LayerChoice({"conv": conv(1), "tanh": nn.Tanh()}, label="third")
        self.pick = InputChoice(3, n_chosen=2, label="pick")
        self.any = InputChoice(3, n_chosen=None, reduction="mean", label="any")

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.first(x), self.second(x)
        picked = self.pick([first, second, self.third(second)])
        return picked + self.any([x, picked, second])


class DartsCell(nn.Module):
    """The cell of DARTS: every cell has the same labels."""

    def __init__(self, n_nodes: int, ops: Callable[[], dict[str, nn.Module]], label: str) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            nn.ModuleList(
                LayerChoice(ops(), label=f"{label}/{i}<-{j}", relaxed_only=("none",))
                for j in range(i)
            )
            for i in range(2, 2 + n_nodes)
        )
        self.inputs = nn.ModuleList(
            InputChoice(i, n_chosen=2, reduction="sum", label=f"{label}/{i}")
            for i in range(2, 2 + n_nodes)
        )

    def forward(self, s0: Tensor, s1: Tensor) -> Tensor:
        states = [s0, s1]
        for edges, inputs in zip(self.edges, self.inputs, strict=True):
            states.append(inputs([edge(state) for edge, state in zip(edges, states, strict=True)]))
        return torch.cat(states[2:], 1)


def three_ops() -> dict[str, nn.Module]:
    return {"none": Zero(), "conv": conv(), "skip": nn.Identity()}


class DartsNet(nn.Module):
    """Cells in a row; `labels` names the kind of each cell."""

    def __init__(
        self,
        labels: Sequence[str] = ("normal", "reduce", "normal"),
        n_nodes: int = 2,
        ops: Callable[[], dict[str, nn.Module]] = three_ops,
    ) -> None:
        super().__init__()
        self.cells = nn.ModuleList(DartsCell(n_nodes, ops, label) for label in labels)
        self.squeeze = nn.ModuleList(nn.Conv2d(CHANNELS * n_nodes, CHANNELS, 1) for _ in labels)

    def forward(self, x: Tensor) -> Tensor:
        s0, s1 = x, x
        for cell, squeeze in zip(self.cells, self.squeeze, strict=True):
            s0, s1 = s1, squeeze(cell(s0, s1))
        return s1


class EnasMacro(nn.Module):
    """The macro space of ENAS: an operation a layer, and any of the earlier layers as skips."""

    def __init__(self, n_layers: int, n_ops: int = 6) -> None:
        super().__init__()
        self.ops = nn.ModuleList(
            LayerChoice([conv(1) for _ in range(n_ops)], label=f"op{i}") for i in range(n_layers)
        )
        self.skips = nn.ModuleList(
            InputChoice(i, n_chosen=None, label=f"skip{i}") for i in range(1, n_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        states = [self.ops[0](x)]
        for op, skips in zip(self.ops[1:], self.skips, strict=True):
            states.append(op(states[-1]) + skips(states))
        return states[-1]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "block": Block,
    "nested": Nested,
    "tied": Tied,
    "repeated": Repeated,
    "arguments": Arguments,
    "inputs": Inputs,
    "darts": DartsNet,
    "enas": lambda: EnasMacro(3, 2),
}


# -- random models ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidates:
    """A layer choice to build; `nested` gives the choice inside a candidate, by its name."""

    label: str | None
    names: tuple[str, ...]
    nested: tuple[tuple[str, Candidates], ...] = ()


@dataclass(frozen=True)
class Step:
    """One value of a random model, from earlier values; value 0 is the model's input.

    kind "layer" and "pair" call a new LayerChoice with one and two arguments, "again" calls that of
    step `again` once more, "input" calls an InputChoice, "plain" a module without choices.
    """

    kind: str
    sources: tuple[int, ...]
    candidates: Candidates | None = None
    n_chosen: int | None = 1
    reduction: str = "sum"
    again: int = 0


Make = Callable[[str, str], nn.Module]
"""Makes a module from its kind ("conv", "bn", "relu", "id") and a name that no other module has."""


def real_module(kind: str, name: str) -> nn.Module:
    makers: dict[str, Callable[[], nn.Module]] = {
        "conv": conv, "bn": conv_bn, "relu": nn.ReLU, "id": nn.Identity,
    }  # fmt: skip
    return makers[kind]()


class Around(nn.Module):
    """A candidate with a choice inside."""

    def __init__(self, before: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.before, self.inner = before, inner

    def forward(self, x: Any) -> Any:
        return self.inner(self.before(x))


class OfPair(nn.Module):
    """A candidate of two arguments that reads both, or only the first."""

    def __init__(self, op: nn.Module, both: bool) -> None:
        super().__init__()
        self.op, self.both = op, both

    def forward(self, x: Any, y: Any) -> Any:
        return self.op(x + y) if self.both else self.op(x)


class RandomModel(nn.Module):
    """A DAG of choices: every value that nobody reads is added to the output."""

    def __init__(self, steps: tuple[Step, ...], make: Make = real_module) -> None:
        super().__init__()
        self.plan = steps
        self.make = make
        self.parts = nn.ModuleList(self._part(step, f"{i}") for i, step in enumerate(steps))
        del self.make
        read = {source for step in steps for source in step.sources}
        self.loose = [i for i in range(1, len(steps) + 1) if i not in read]

    def _part(self, step: Step, name: str) -> nn.Module:
        if step.kind == "plain":
            return self.make("conv", name)
        if step.kind == "input":
            return InputChoice(len(step.sources), step.n_chosen, reduction=step.reduction)
        if step.kind == "again":
            return nn.Identity()  # keeps the indices; never called
        assert step.candidates is not None
        return self._choice(step.candidates, name, step.kind == "pair")

    def _choice(self, c: Candidates, name: str, pair: bool) -> LayerChoice:
        nested = dict(c.nested)
        built: dict[str, nn.Module] = {}
        for kind in c.names:
            full = f"{name}.{kind}"
            built[kind] = module = self.make(kind, full)
            if kind in nested:
                built[kind] = Around(module, self._choice(nested[kind], full, False))
            elif pair:
                built[kind] = OfPair(module, both=kind != "relu")
        return LayerChoice(built, label=c.label)

    def forward(self, x: Any) -> Any:
        values = [x]
        for step, part in zip(self.plan, self.parts, strict=True):
            inputs = [values[i] for i in step.sources]
            if step.kind == "input":
                values.append(part(inputs))
            elif step.kind == "again":
                values.append(self.parts[step.again](*inputs))
            else:
                values.append(part(*inputs))
        result = values[self.loose[0]]
        for i in self.loose[1:]:
            result = result + values[i]
        return result

    def extra_repr(self) -> str:
        return "\n".join(map(str, self.plan))


_KINDS = ("conv", "bn", "relu", "id")


@st.composite
def _candidates(draw: st.DrawFn, label: str | None, depth: int) -> Candidates:
    chosen = draw(st.sets(st.sampled_from(_KINDS), min_size=2, max_size=3))
    names = tuple(kind for kind in _KINDS if kind in chosen)
    nested: list[tuple[str, Candidates]] = []
    if depth and draw(st.booleans()):
        inner = draw(_candidates(None, depth - 1))
        nested.append((draw(st.sampled_from(names)), inner))
    return Candidates(label, names, tuple(nested))


@st.composite
def random_steps(draw: st.DrawFn, max_steps: int = 5) -> tuple[Step, ...]:
    """What a `RandomModel` is built from."""
    steps: list[Step] = []
    for i in range(draw(st.integers(1, max_steps))):
        values = st.integers(0, i)
        layers = [j for j, step in enumerate(steps) if step.kind == "layer"]
        kinds = ["layer"] if not steps else ["layer", "pair", "plain"]
        kinds += ["again"] if layers else []
        kinds += ["input", "input"] if i else []
        kind = draw(st.sampled_from(kinds))
        if kind == "layer":
            label = f"layer{i}" if draw(st.booleans()) else None
            candidates = draw(_candidates(label, 2))
            known = [steps[j].candidates for j in layers]
            labelled = [c for c in known if c is not None and c.label is not None]
            if labelled and draw(st.booleans()):
                candidates = draw(st.sampled_from(labelled))  # tied
            steps.append(Step(kind, (draw(values),), candidates))
        elif kind == "pair":
            candidates = draw(_candidates(None, 0))
            steps.append(Step(kind, (draw(values), draw(values)), candidates))
        elif kind == "again":
            steps.append(Step(kind, (draw(values),), again=draw(st.sampled_from(layers))))
        elif kind == "input":
            sources = tuple(draw(st.lists(values, min_size=2, max_size=3, unique=True)))
            n_chosen = draw(st.sampled_from([1, 2, None]))
            reduction = draw(st.sampled_from(["sum", "mean"]))
            steps.append(Step(kind, sources, n_chosen=n_chosen, reduction=reduction))
        else:
            steps.append(Step(kind, (draw(values),)))
    return tuple(steps)


@st.composite
def random_models(draw: st.DrawFn, max_steps: int = 5) -> RandomModel:
    """A small random model in train mode, with seeded weights; run it on `example()`."""
    steps = draw(random_steps(max_steps))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        return RandomModel(steps)
