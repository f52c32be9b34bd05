"""The models of the two ENAS spaces; `nasfx.spaces.enas` describes and builds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from nasfx.choice import InputChoice, LayerChoice
from nasfx.spaces.blocks import (
    DropPath,
    FactorizedReduction,
    auxiliary_head,
    relu_conv_bn,
    separable_conv,
)

MACRO_OPERATIONS = (
    "conv_3x3", "sep_conv_3x3", "conv_5x5", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3",
)  # fmt: skip
"""The candidates of a macro layer, in the authors' order."""

MICRO_OPERATIONS = ("sep_conv_3x3", "sep_conv_5x5", "avg_pool_3x3", "max_pool_3x3", "identity")
"""The candidates of a side of a micro node, in the authors' order."""

NODES = range(2, 7)
SIDES = ("x", "y")


# -- macro -----------------------------------------------------------------------------------------


def _macro_operation(name: str, c_in: int, c: int, *, evaluation: bool) -> nn.Module:
    if name.endswith("pool_3x3"):
        pool = (
            nn.MaxPool2d(3, 1, 1) if name.startswith("max") else nn.AvgPool2d(3, 1, 1, False, False)
        )
        reduced = relu_conv_bn(c_in, c) if evaluation else _conv_bn_relu(c_in, c, 1)
        return nn.Sequential(reduced, pool)
    kernel = int(name[-1])
    if evaluation:
        return nn.Sequential(relu_conv_bn(c_in, c), relu_conv_bn(c, c, kernel))
    if name.startswith("sep"):
        depthwise = nn.Conv2d(c, c, kernel, padding=kernel // 2, groups=c, bias=False)
        return nn.Sequential(_conv_bn_relu(c_in, c, 1), depthwise, _conv_bn_relu(c, c, 1))
    return nn.Sequential(_conv_bn_relu(c_in, c, 1), _conv_bn_relu(c, c, kernel))


def _conv_bn_relu(c_in: int, c: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c), nn.ReLU())


def _relu_conv(c_in: int, c: int) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(c_in, c, 1, bias=False))


class _MacroLayer(nn.Module):
    """Layer l of the l + 1 states before it, of `c` channels, the last of which it reads."""

    def __init__(self, index: int, c: int, *, evaluation: bool) -> None:
        super().__init__()
        self.op = LayerChoice(
            {
                name: _macro_operation(name, c, c, evaluation=evaluation)
                for name in MACRO_OPERATIONS
            },
            label=f"op/{index}",
        )
        self.skips = InputChoice(index, n_chosen=None, label=f"skip/{index}") if index else None
        if self.skips is not None:
            self.norm = nn.BatchNorm2d(c)
            joined = index + 1 if evaluation else 0
            self.joins = nn.ModuleList(_relu_conv(c, c) for _ in range(joined))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        *earlier, x = states
        x = self.op(x)
        if self.skips is None:
            return x
        if self.joins:
            *earlier, x = (join(s) for join, s in zip(self.joins, [*earlier, x], strict=True))
        return self.norm(x + self.skips(list(earlier)))


class _Halving(nn.Module):
    """Every state halved in height and width, by weights of its own."""

    def __init__(self, n_states: int, c_in: int, c: int) -> None:
        super().__init__()
        self.states = nn.ModuleList(
            FactorizedReduction(c_in, c, relu=False) for _ in range(n_states)
        )

    def forward(self, states: Sequence[Tensor]) -> list[Tensor]:
        return [halve(s) for halve, s in zip(self.states, states, strict=True)]


class MacroNet(nn.Module):
    """The macro net of both forms; see `nasfx.spaces.enas.macro`."""

    def __init__(
        self, channels: int, layers: int, classes: int, *, evaluation: bool, dropout: float
    ) -> None:
        super().__init__()
        c, third = channels, layers // 3
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.layers = nn.ModuleList()
        self.halvings = nn.ModuleDict()
        for i in range(layers):
            self.layers.append(_MacroLayer(i, c, evaluation=evaluation))
            if i in (third - 1, 2 * third - 1):
                wider = 2 * c if evaluation else c
                self.halvings[str(i)] = _Halving(i + 2, c, wider)
                c = wider
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(c, classes, False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, classes), H and W multiples of 4."""
        states = [self.stem(x)]
        for i, layer in enumerate(self.layers):
            states.append(layer(states))
            if str(i) in self.halvings:
                states = self.halvings[str(i)](states)
        return self.classifier(states[-1])


# -- micro -----------------------------------------------------------------------------------------


def _micro_operations(c: int, stride: int, *, drop: bool) -> dict[str, nn.Module]:
    """The candidates of a side that reads one state, of `c` channels."""
    found = {
        "sep_conv_3x3": separable_conv(c, 3, stride),
        "sep_conv_5x5": separable_conv(c, 5, stride),
        "avg_pool_3x3": nn.AvgPool2d(3, stride, 1, count_include_pad=False),
        "max_pool_3x3": nn.MaxPool2d(3, stride, 1),
    }
    if drop:
        found = {name: nn.Sequential(module, DropPath()) for name, module in found.items()}
    identity = nn.Identity() if stride == 1 else FactorizedReduction(c, c, relu=False)
    return {**found, "identity": identity}


class _Reading(nn.Module):
    """The operation on one of the states."""

    def __init__(self, state: int, op: LayerChoice) -> None:
        super().__init__()
        self.state, self.op = state, op

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        return self.op(states[self.state])


class _Loose(nn.Module):
    """(what goes on, what does not): without a state if a node reads it, else with it."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.read = read

    def forward(
        self, with_it: Sequence[Tensor], without: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # Both are given, so that a search space sees at once that every state counts: it is read,
        # or loose.
        return (without, with_it) if self.read else (with_it, without)


Exit = tuple[Callable[[], nn.Module], nn.Module]
"""What makes the layer of each loose end, without bias and norm, and what follows their sum."""


class _LooseEnd(nn.Module):
    """Add to the totals of all exits the terms of one state, unless a node reads it.

    Args:
        layers: of the exits.
        gates: choices that keep (totals with the terms, totals without) or swap them, one for each
            side of each later node.
    """

    def __init__(self, layers: Sequence[nn.Module], gates: Sequence[LayerChoice]) -> None:
        super().__init__()
        self.layers, self.gates = nn.ModuleList(layers), nn.ModuleList(gates)

    def forward(self, state: Tensor, without: Sequence[Tensor]) -> list[Tensor]:
        terms = [layer(state) for layer in self.layers]
        if not without:
            return terms
        totals = [total + term for total, term in zip(without, terms, strict=True)]
        for gate in self.gates:
            kept = gate(totals, list(without))[0]
            totals = [kept[i] for i in range(len(terms))]
        return totals


class _Cell(nn.Module):
    """A cell, and what reads its output.

    Args:
        kind: "normal" or "reduce".
        c: the channels of all states.
        stride: of the operations on states 0 and 1.
        exits: by name, what reads the loose ends.
        drop: whether operations have a drop path.
    """

    def __init__(
        self, kind: str, c: int, stride: int, exits: Mapping[str, Exit], *, drop: bool
    ) -> None:
        super().__init__()
        sides = [(node, f"{kind}/{node}/{side}") for node in NODES for side in SIDES]

        def reading(state: int, label: str) -> _Reading:
            operations = _micro_operations(c, stride if state < 2 else 1, drop=drop)
            return _Reading(state, LayerChoice(operations, label=f"{label}/op"))

        def gate(node: int, label: str, state: int) -> LayerChoice:
            return LayerChoice({str(s): _Loose(s == state) for s in range(node)}, label=label)

        self.sides = nn.ModuleList(
            LayerChoice({str(s): reading(s, label) for s in range(node)}, label=label)
            for node, label in sides
        )
        self.halve = nn.ModuleList(
            FactorizedReduction(c, c, relu=False) if stride > 1 else nn.Identity() for _ in range(2)
        )
        self.ends = nn.ModuleList(
            _LooseEnd(
                [layer() for layer, _ in exits.values()],
                [gate(node, label, state) for node, label in sides if node > state],
            )
            for state in range(NODES[-1] + 1)
        )
        self.after = nn.ModuleDict({name: after for name, (_, after) in exits.items()})

    def forward(self, s0: Tensor, s1: Tensor) -> dict[str, Tensor]:
        states = [s0, s1]
        for x, y in zip(self.sides[::2], self.sides[1::2], strict=True):
            states.append(x(list(states)) + y(list(states)))
        states[:2] = [halve(s) for halve, s in zip(self.halve, states[:2], strict=True)]
        totals: list[Tensor] = []
        for end, state in reversed(list(zip(self.ends, states, strict=True))):
            totals = end(state, totals)
        return {name: f(t) for (name, f), t in zip(self.after.items(), totals, strict=True)}


def _kinds(cells: int) -> list[str]:
    """The kinds of the `cells` normal cells and the two reductions among them."""
    reductions = (cells // 3, 2 * (cells // 3) + 1)
    return ["reduce" if i in reductions else "normal" for i in range(cells + 2)]


def _head_at(cells: int) -> int:
    return 2 * (cells // 3) + 2


def _stem(channels: int) -> nn.Sequential:
    c = 3 * channels
    return nn.Sequential(nn.Conv2d(3, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))


def _classifier(c: int, classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(c, classes, bias=False),
    )  # fmt: skip


class MicroSearchNet(nn.Module):
    """The micro net of the search; see `nasfx.spaces.enas.micro`."""

    def __init__(
        self, channels: int, cells: int, classes: int, *, auxiliary: bool, dropout: float
    ) -> None:
        super().__init__()
        self.stem = _stem(channels)
        self.first, self.second, self.cells = (nn.ModuleList() for _ in range(3))
        self.halvings = nn.ModuleDict()
        self.head_at, self.head = _head_at(cells), None
        c = channels
        c0 = c1 = 3 * channels
        for i, kind in enumerate(_kinds(cells)):
            halves = kind == "reduce"
            if halves:
                c *= 2
                self.halvings[str(i)] = FactorizedReduction(c1, c, relu=False)
                c0, c1 = c1, c
            self.first.append(FactorizedReduction(c0, c) if halves else _calibrated(c0, c))
            self.second.append(_calibrated(c1, c))
            output = (lambda c=c: _relu_conv(c, c), nn.BatchNorm2d(c))
            self.cells.append(_Cell(kind, c, 1, {"output": output}, drop=False))
            c0, c1 = c1, c
            if auxiliary and i == self.head_at:
                self.head = auxiliary_head(c, classes, 3, bias=False)
        self.classifier = _classifier(c, classes, dropout)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(N, 3, H, W) to (N, classes), or two of these; H and W multiples of 4."""
        s0 = s1 = features = self.stem(x)
        rows = zip(self.first, self.second, self.cells, strict=True)
        for i, (first, second, cell) in enumerate(rows):
            if str(i) in self.halvings:
                s0, s1 = s1, self.halvings[str(i)](s1)
            s0, s1 = s1, cell(first(s0), second(s1))["output"]
            if i == self.head_at:
                features = s1
        logits = self.classifier(s1)
        if self.head is not None and self.training:
            return logits, self.head(features)
        return logits


def _calibrated(c_in: int, c: int) -> nn.Module:
    return nn.Identity() if c_in == c else relu_conv_bn(c_in, c)


class MicroFixedNet(nn.Module):
    """The micro net for retraining; see `nasfx.spaces.enas.micro`."""

    def __init__(
        self, channels: int, cells: int, classes: int, *, auxiliary: bool, dropout: float
    ) -> None:
        super().__init__()
        self.stem = _stem(channels)
        self.head_at, self.auxiliary = _head_at(cells), auxiliary
        kinds = _kinds(cells)
        widths = [channels * 2 ** kinds[: i + 1].count("reduce") for i in range(len(kinds))]
        c = 3 * channels
        self.first0 = relu_conv_bn(c, widths[0])
        self.first1 = relu_conv_bn(c, widths[1])
        self.second0 = nn.Sequential(relu_conv_bn(c, widths[0]), relu_conv_bn(widths[0], widths[0]))
        self.cells = nn.ModuleList()
        for i, (kind, c) in enumerate(zip(kinds, widths, strict=True)):
            exits: dict[str, Exit] = {}
            if i + 1 < len(kinds):
                exits["second"] = _to_second(c, widths[i + 1])
            if i + 2 < len(kinds):
                exits["first"] = _to_first(c, widths[i + 2], halves=kinds[i + 1] == "reduce")
            if i + 1 == len(kinds):
                exits["logits"] = _to_logits(c, classes, dropout)
            if auxiliary and i == self.head_at:
                exits["auxiliary"] = _to_auxiliary(c, classes)
            stride = 2 if kind == "reduce" else 1
            self.cells.append(_Cell(kind, c, stride, exits, drop=True))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(N, 3, H, W) to (N, classes), or two of these; H and W multiples of 4."""
        x = self.stem(x)
        firsts, second = [self.first0(x), self.first1(x)], self.second0(x)
        found: dict[str, Tensor] = {}
        for cell in self.cells:
            outputs = cell(firsts.pop(0), second)
            found |= outputs
            second = found["second"]
            if "first" in outputs:
                firsts.append(outputs["first"])
        if self.auxiliary and self.training:
            return found["logits"], found["auxiliary"]
        return found["logits"]


def _to_second(c: int, wider: int) -> Exit:
    after = nn.Sequential(nn.BatchNorm2d(wider), relu_conv_bn(wider, wider))
    return lambda: _relu_conv(c, wider), after


def _to_first(c: int, wider: int, *, halves: bool) -> Exit:
    if halves:
        return lambda: FactorizedReduction(c, wider, norm=False), nn.BatchNorm2d(wider)
    return lambda: _relu_conv(c, wider), nn.BatchNorm2d(wider)


def _to_logits(c: int, classes: int, dropout: float) -> Exit:
    return lambda: _classifier(c, classes, dropout), nn.Identity()


def _to_auxiliary(c: int, classes: int) -> Exit:
    return (
        lambda: auxiliary_head(c, classes, 3, bias=False)[:3],
        auxiliary_head(c, classes, 3, bias=False)[3:],
    )
