"""Costs as objectives and constraints, and the losses that weigh them against the task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from nasfx.architecture import SpaceChoice
from nasfx.costs.calls import Call, cost_model
from nasfx.costs.model import CostModel, Terms
from nasfx.errors import SearchError
from nasfx.places import Condition, places_and_uses

_WEIGHTS = {  # by loss, the names and defaults of its constants
    "add#linear": {"lambda_": 0.1},
    "mul#log": {"alpha": 0.2, "beta": 0.3},
    "mul#power": {"beta": 0.1},
    "fbnet-mul": {"alpha": 0.2, "beta": 0.6},
    "fbnet-add": {"alpha": 0.2, "beta": 0.6},
}
_LOGS = ("mul#log", "fbnet-mul")
_POWERS = ("mul#power", "fbnet-add")
_TARGETLESS = ("fbnet-mul", "fbnet-add")


@dataclass(frozen=True)
class Objective:
    """A cost of the architecture: an objective when it has a target, a constraint with `max`.

    With L the task loss, E the expected cost and T the target, in the objective's unit:

    =========== ============================== =====================================================
    add#linear  L + lambda_ (E - T) / T        ProxylessNAS's code; lambda_ = 0.1
    mul#log     L alpha (log E / log T)^beta   ProxylessNAS's code; alpha = 0.2, beta = 0.3
    mul#power   L (E / T)^beta                 the reward acc (T / E)^beta of ProxylessNAS's
                                           REINFORCE variant, as a loss; beta = 0.1
    fbnet-mul   L alpha log(E)^beta            FBNet (arXiv 1812.03443), equation 2; 0.2, 0.6
    fbnet-add   L + alpha E^beta               the additive mode of NNI's FBNet; 0.2, 0.6
    =========== ============================== =====================================================

    The losses of FBNet have no target in them: they pull the cost down however low it is. A target
    that is given is only kept. Strategies that learn from rewards subtract the term that a loss
    adds, divide a reward of zero or more by the factor that it multiplies with (without alpha), and
    multiply a negative one, such as minus the loss, by it.

    Attributes:
        target: the cost to aim at, in `unit`.
        max: what the derived architecture may cost at most, in `unit`.
        loss: a name of the table; by default "add#linear" where there is a target.
        unit: of all figures; "", "k", "M" or "G", the prefix of one.
        lambda_: see the table, like the other two; None for the table's value.
        alpha: see the table.
        beta: see the table.

    Raises:
        SearchError: an unknown loss or unit, a figure that is not positive, or a constant that the
            loss does not have.
    """

    target: float | None = None
    _: KW_ONLY
    max: float | None = None
    loss: str | None = None
    unit: str = ""
    lambda_: float | None = None
    alpha: float | None = None
    beta: float | None = None

    quantity: ClassVar[str]
    units: ClassVar[Mapping[str, float]] = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}

    def __post_init__(self) -> None:
        what = type(self).__name__
        for name in ("target", "max"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise SearchError(f"{what}({name}={value!r}): it must be a positive number")
        if self.unit not in self.units:
            raise SearchError(f"{what}(unit={self.unit!r}): it must be one of {list(self.units)}")
        if self.loss is not None and self.loss not in _WEIGHTS:
            raise SearchError(f"{what}(loss={self.loss!r}): it must be one of {list(_WEIGHTS)}")
        if self.loss is not None and self.loss not in _TARGETLESS and self.target is None:
            raise SearchError(f"{what}(loss={self.loss!r}) needs a target to compare the cost with")
        for name in ("lambda_", "alpha", "beta"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in _WEIGHTS.get(self.loss_name, {}):
                raise SearchError(f"{what}({name}={value!r}): loss {self.loss_name!r} has none")
            if not (_is_number(value) and 0 < value < math.inf):
                raise SearchError(f"{what}({name}={value!r}): it must be a positive number")
        if self.loss_name in _LOGS and self.target is not None and self.target <= 1:
            raise SearchError(
                f"{what}(target={self.target!r}, loss={self.loss!r}): the logarithm of a target of "
                "at most 1 is not positive; use a smaller unit, or loss='add#linear'"
            )

    # -- what it is --------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The key of `expected_cost()`."""
        return self.quantity

    @property
    def loss_name(self) -> str:
        """The loss, also where it is the default; "" for a mere constraint."""
        return self.loss or ("add#linear" if self.target is not None else "")

    @property
    def adds(self) -> bool:
        """Whether the loss adds a term, which is done after all factors."""
        return self.loss_name in ("add#linear", "fbnet-add")

    def model(
        self, gm: fx.GraphModule, choices: tuple[SpaceChoice, ...], example_inputs: tuple[Any, ...]
    ) -> CostModel:
        """What architectures cost, in `unit`, from a graph that annotate-cost has annotated."""
        return cost_model(gm, choices, self.quantity).divided(self.units[self.unit])

    def check(self, model: CostModel) -> None:
        """Refuse bounds that nothing keeps, and logarithms of costs that are too small.

        Raises:
            SearchError: as said.
        """
        lowest, decisions = model.extreme(min)
        if self.max is not None and lowest > self.max:
            raise SearchError(
                f"{self.name}: no architecture costs at most max={self.max:g}{self.unit}; the "
                f"cheapest one costs {lowest:g}{self.unit}"
            )
        # A mixture holds the candidates that are never chosen, too.
        every = {k: replace(c, relaxed_only=()) for k, c in model.choices.items()}
        lowest, decisions = CostModel(model.places, model.terms, every).extreme(min)
        if self.loss_name in _POWERS and lowest <= 0:
            raise SearchError(
                f"{self.name}: loss {self.loss!r} takes a power of the cost, which must be above "
                f"0, but {decisions} costs {lowest:g}; use loss='add#linear'"
            )
        if self.loss_name in _LOGS and lowest <= 1:
            raise SearchError(
                f"{self.name}: loss {self.loss!r} takes the logarithm of the cost, which must be "
                f"above 1, but {decisions} costs {lowest:g} in units of {self.unit or 'one'!r}; "
                "use a smaller unit, or loss='add#linear'"
            )

    # -- what it does to a loss --------------------------------------------------------------------

    def _constant(self, name: str) -> float:
        value = getattr(self, name)
        return _WEIGHTS[self.loss_name][name] if value is None else value

    def factor(self, cost: Tensor) -> Tensor | None:
        """What the loss is multiplied with, alpha left out; None for losses that add."""
        match self.loss_name:
            case "mul#log":
                assert self.target is not None
                return (cost.log() / math.log(self.target)) ** self._constant("beta")
            case "mul#power":
                assert self.target is not None
                return (cost / self.target) ** self._constant("beta")
            case "fbnet-mul":
                return cost.log() ** self._constant("beta")
            case _:
                return None

    def term(self, cost: Tensor) -> Tensor | None:
        """What is added to the loss; None for losses that multiply."""
        match self.loss_name:
            case "add#linear":
                assert self.target is not None
                return self._constant("lambda_") * (cost - self.target) / self.target
            case "fbnet-add":
                return self._constant("alpha") * cost ** self._constant("beta")
            case _:
                return None

    def penalised(self, loss: Tensor, cost: Tensor) -> Tensor:
        """The task loss with the cost weighed in, by the table above; 0-d."""
        cost = cost.to(loss.device)
        if (factor := self.factor(cost)) is not None:
            alpha = 1.0 if self.loss_name == "mul#power" else self._constant("alpha")
            return loss * (alpha * factor).to(loss.dtype)
        term = self.term(cost)
        return loss if term is None else loss + term.to(loss.dtype)

    def rewarded(self, reward: float, cost: float) -> float:
        """A reward, higher is better, with the cost of the rewarded architecture weighed in."""
        value = torch.tensor(cost, dtype=torch.float64)
        if (factor := self.factor(value)) is not None:
            return reward * float(factor) if reward < 0 else reward / float(factor)
        term = self.term(value)
        return reward if term is None else reward - float(term)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Flops(Objective):
    """Multiply-accumulates on one sample; see `Objective`.

    Example:
        >>> Flops(300, unit="M").loss_name
        'add#linear'
    """

    quantity: ClassVar[str] = "flops"


@dataclass(frozen=True)
class Params(Objective):
    """Elements of the parameters; see `Objective`."""

    quantity: ClassVar[str] = "params"


@dataclass(frozen=True)
class CustomCost(Objective):
    """A cost of your own, from a table or a function; see `Objective`.

    Attributes:
        costs: a table, {label: {candidate: cost}}: what a layer choice's candidate costs wherever
            the choice is called, choices inside it not included. Or a function that is given every
            call of the model (`nasfx.costs.calls.Call`), fixed ones too, and returns its cost.
        title: its name, the key of `expected_cost()`.
        fixed: what every architecture costs beside.

    Raises:
        SearchError: a cost that is no finite number of zero or more.
    """

    costs: Mapping[str, Mapping[str, float]] | Callable[[Call], float] = field(kw_only=True)
    title: str = field(default="custom", kw_only=True)
    fixed: float = field(default=0.0, kw_only=True)

    quantity: ClassVar[str] = "custom"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.costs) and not isinstance(self.costs, Mapping):
            raise SearchError(
                f"CustomCost(costs={self.costs!r}): give a table {{label: {{candidate: cost}}}}, "
                "or a function of a call"
            )
        self._checked(self.fixed, "fixed")

    @property
    def name(self) -> str:
        """The key of `expected_cost()`."""
        return self.title

    def model(
        self, gm: fx.GraphModule, choices: tuple[SpaceChoice, ...], example_inputs: tuple[Any, ...]
    ) -> CostModel:
        """What architectures cost, in `unit`.

        Raises:
            SearchError: the table lacks a row, or has one for no candidate.
        """
        costs = self.costs
        if callable(costs):

            def of(call: Call) -> float:
                return self._checked(costs(call), f"the call of {call.path}")

            model = cost_model(gm, choices, of)
        else:
            model = self._of_table(gm, choices, costs)
        terms = dict(model.terms)
        if self.fixed:
            always = frozenset({Condition()})
            terms[always] = terms.get(always, 0) + self.fixed
        return CostModel(model.places, terms, model.choices)

    def _of_table(
        self,
        gm: fx.GraphModule,
        choices: tuple[SpaceChoice, ...],
        table: Mapping[str, Mapping[str, float]],
    ) -> CostModel:
        layers = {choice.label: choice for choice in choices if choice.kind == "layer"}
        for label, row in table.items():
            if label not in layers:
                raise SearchError(
                    f"{self.name}: the table has a row for {label!r}, no layer choice"
                )
            if unknown := set(row) - set(layers[label].candidates):
                raise SearchError(f"{self.name}: {label!r} has no candidate {min(unknown)!r}")
        for label, choice in layers.items():
            if missing := [n for n in choice.candidates if n not in table.get(label, {})]:
                raise SearchError(
                    f"{self.name}: the table has no cost for candidate {missing[0]!r} of {label!r}"
                )
        places, _ = places_and_uses(gm)
        terms: Terms = {}
        for i, place in enumerate(places):
            if place.label not in layers:
                continue
            for name, cost in table[place.label].items():
                where = frozenset({Condition((i, (place.label, frozenset({name}))))})
                if amount := self._checked(cost, f"{place.label!r}, candidate {name!r}"):
                    terms[where] = amount
        return CostModel(tuple(places), terms, {choice.label: choice for choice in choices})

    def _checked(self, value: Any, what: str) -> float:
        if not _is_number(value) or not 0 <= value < math.inf:
            raise SearchError(
                f"{self.title}: {what} costs {value!r}; a cost is a finite number of zero or more"
            )
        return float(value)


def checked_objectives(given: Any) -> tuple[Objective, ...]:
    """An objective, several, or None, as a tuple.

    Raises:
        SearchError: something else, or two of one name.
    """
    if given is None:
        return ()
    several = tuple(given) if isinstance(given, list | tuple) else (given,)
    for objective in several:
        if not isinstance(objective, Objective):
            raise SearchError(
                f"objective={objective!r}: give nasfx.Flops(...), nasfx.Params(...), "
                "nasfx.Latency(...), nasfx.CustomCost(...), or a list of them"
            )
    names = [objective.name for objective in several]
    if len(set(names)) < len(names):
        raise SearchError(f"two objectives have one name: {names}; give CustomCost another title")
    return several
