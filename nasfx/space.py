"""The search space: which decisions there are, which of them count, and how many subnets they make.

A decision counts (is *active*) only where it changes what is computed: a choice inside a candidate
while that candidate is chosen, a choice that feeds only an input of an InputChoice while that input
is chosen. An `Architecture` that holds exactly the active decisions is *canonical*; two different
canonical architectures are two different subnets, and sizes count those.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from nasfx.architecture import Architecture, SpaceChoice
from nasfx.choice import Choice, Decision, LayerChoice
from nasfx.errors import SpaceError
from nasfx.places import Activity, Condition, Literal, Place, literal_holds, places_of
from nasfx.rewriting.editing import is_identity
from nasfx.rewriting.effects import adds_to_input, gives_zeros
from nasfx.tracing import TracedModel, trace


class SearchSpace:
    """All architectures of a model.

    Attributes:
        choices: the decisions, outer ones first, in the order of the graph.
        size: the exact number of canonical architectures.
        costs: by name, what a canonical architecture costs.
        bounds: by name, what it may cost at most.
        places: where the choices are called.
    """

    def __init__(self, choices: Sequence[SpaceChoice], places: Sequence[Place]) -> None:
        self.choices = tuple(choices)
        self.costs: dict[str, Callable[[Architecture], float]] = {}
        self.bounds: dict[str, float] = {}
        self._by_label = {choice.label: choice for choice in choices}
        self.places = tuple(places)
        self._places_of: dict[str, list[int]] = {}
        for i, place in enumerate(places):
            self._places_of.setdefault(place.label, []).append(i)
        self._activity = Activity(places)
        self._literals = {
            choice.label: self._activity.literals(self._conditions(choice.label))
            for choice in choices
        }
        self._counts: dict[object, int] = {}

    def __getitem__(self, label: str) -> SpaceChoice:
        return self._by_label[label]

    def __repr__(self) -> str:
        lines = [f"SearchSpace of {self.size:,} architectures"]
        for c in self.choices:
            kind = "" if c.kind == "layer" else f", choose {c.n_chosen or 'any'}"
            lines.append(f"  {c.label}: {', '.join(map(str, c.candidates))}{kind}")
        return "\n".join(lines)

    # -- which decisions count -------------------------------------------------------------------

    def _conditions(self, label: str) -> list[Condition]:
        """When the places of `label` are run; it is active where any of them is."""
        return [self.places[i].condition for i in self._places_of[label]]

    def _active(
        self,
        label: str,
        decided: Mapping[str, Decision],
        memo: dict[int, bool | None] | None = None,
    ) -> bool | None:
        """Whether `label` is active; None where that depends on what is not decided yet.

        `memo` keeps what is known of the places, for further labels under the same decisions.
        """
        return self._activity.truth(
            self._conditions(label),
            lambda literal: literal_holds(literal, decided),
            {} if memo is None else memo,
        )

    def active(self, architecture: Mapping[str, Decision]) -> tuple[str, ...]:
        """The labels that are active in a complete `architecture`."""
        return tuple(c.label for c in self.choices if self._active(c.label, architecture) is True)

    # -- what a user asks ------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """The exact number of canonical architectures."""
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + 20 * len(self.choices))  # nested choices count recursively
        try:
            return self._count(frozenset(self._by_label), {})
        finally:
            sys.setrecursionlimit(limit)

    def validate(self, architecture: Mapping[str, object]) -> Architecture:
        """The canonical form: exactly the active decisions, in the order of `choices`.

        Raises:
            SpaceError: an unknown label, a decision that the choice does not have, or an active
                label without a decision. Decisions for inactive labels are dropped.
        """
        given = Architecture(architecture)
        if unknown := [label for label in given if label not in self._by_label]:
            raise SpaceError(
                f"no choice has the label {unknown[0]!r}; the labels are "
                f"{', '.join(map(repr, self._by_label))}"
            )
        decided = {label: self._by_label[label].checked(given.decision(label)) for label in given}
        canonical: dict[str, Decision] = {}
        memo: dict[int, bool | None] = {}
        for choice in self.choices:
            active = self._active(choice.label, decided, memo)
            if active is not False and choice.label not in decided:
                if active is None:
                    continue  # it depends on a missing label, which is reported itself
                raise SpaceError(
                    f"the architecture has no decision for {choice.label!r}, which is active; "
                    f"its candidates are {choice.candidates}"
                )
            if active:
                canonical[choice.label] = decided[choice.label]
        return Architecture(canonical)

    def fits(self, architecture: Architecture) -> bool:
        """Whether a canonical architecture keeps within all bounds."""
        return all(self.costs[name](architecture) <= bound for name, bound in self.bounds.items())

    def sample(self, generator: torch.Generator | None = None) -> Architecture:
        """A canonical architecture, each active decision drawn uniformly."""
        return self.walk(lambda choice: choice.draw(generator))

    def mutate(
        self,
        architecture: Mapping[str, object],
        p: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> Architecture:
        """`architecture` with each decision drawn anew with probability `p`.

        Decisions that become active are drawn; those that become inactive are dropped.
        """
        if not 0 <= p <= 1:
            raise SpaceError(f"p={p!r} is not a probability")
        old = self.validate(architecture)

        def decide(choice: SpaceChoice) -> Decision:
            anew = float(torch.rand((), generator=generator)) < p
            if choice.label in old and not anew:
                return old.decision(choice.label)
            return choice.draw(generator)

        return self.walk(decide)

    def enumerate(self) -> Iterator[Architecture]:
        """All canonical architectures, in a fixed order."""
        stack: list[tuple[dict[str, Decision], str, Iterator[Decision]]] = []
        decided: dict[str, Decision] = {}
        while True:
            label = next((c.label for c in self._undecided(decided)), None)
            if label is None:
                yield self.validate(decided)
            else:
                stack.append((decided, label, self._by_label[label].values()))
            while stack:
                before, label, values = stack[-1]
                value = next(values, None)
                if value is not None:
                    decided = {**before, label: value}
                    break
                stack.pop()
            else:
                return

    # -- how --------------------------------------------------------------------------------------

    def _undecided(self, decided: Mapping[str, Decision]) -> Iterator[SpaceChoice]:
        memo: dict[int, bool | None] = {}
        for choice in self.choices:
            if choice.label not in decided and self._active(choice.label, decided, memo):
                yield choice

    def walk(self, decide: Callable[[SpaceChoice], Decision]) -> Architecture:
        """Decide every active label by `decide`, outer ones first."""
        decided: dict[str, Decision] = {}
        while todo := list(self._undecided(decided)):
            for choice in todo:
                decided[choice.label] = decide(choice)
        return Architecture({c.label: decided[c.label] for c in self.choices if c.label in decided})

    def _count(self, labels: frozenset[str], decided: Mapping[str, Decision]) -> int:
        """The canonical ways to decide `labels`, given what is decided of the others."""
        memo: dict[int, bool | None] = {}
        active = {label: self._active(label, decided, memo) for label in labels}
        alive = {label for label in labels if active[label] is not False}
        total = 1
        for component in self._components(alive):
            sure = [c.label for c in self.choices if c.label in component and active[c.label]]
            if not sure:
                continue  # labels that only activate each other are never active
            literals = {lit for label in component for lit in self._literals[label]}
            key = (
                component,
                frozenset(
                    (lit, literal_holds(lit, decided)) for lit in literals if lit[0] in decided
                ),
            )
            if key not in self._counts:
                self._counts[key] = self._count_component(component, sure, literals, decided)
            total *= self._counts[key]
        return total

    def _count_component(
        self,
        component: frozenset[str],
        sure: Sequence[str],
        literals: set[Literal],
        decided: Mapping[str, Decision],
    ) -> int:
        mentioned = {label for label, _ in literals}
        first = next((label for label in sure if label in mentioned), sure[0])
        choice = self._by_label[first]
        rest = component - {first}
        if not rest:
            return choice.n_values
        # Values under which the same literals hold leave the same count behind.
        relevant = [lit for lit in literals if lit[0] == first]
        groups: dict[tuple[bool | None, ...], list[Decision]] = {}
        for value in choice.values():
            truth = tuple(literal_holds(lit, {first: value}) for lit in relevant)
            groups.setdefault(truth, []).append(value)
        return sum(
            len(values) * self._count(rest, {**decided, first: values[0]})
            for values in groups.values()
        )

    def _components(self, labels: set[str]) -> Iterator[frozenset[str]]:
        """`labels` in sets that do not depend on each other."""
        near: dict[str, set[str]] = {label: set() for label in labels}
        for label in labels:
            for other, _ in self._literals[label]:
                if other in labels:
                    near[label].add(other)
                    near[other].add(label)
        left = set(labels)
        for choice in self.choices:
            if choice.label not in left:
                continue
            component, stack = set[str](), [choice.label]
            while stack:
                label = stack.pop()
                if label not in component:
                    component.add(label)
                    stack.extend(near[label])
            left -= component
            yield frozenset(component)


def search_space(model_or_net: nn.Module) -> SearchSpace:
    """The search space of a model with choices, or of what `trace` or `transform` made of one.

    Raises:
        TraceError, SpaceError: as `trace`.

    Example:
        >>> from nasfx import LayerChoice
        >>> search_space(nn.Sequential(LayerChoice([nn.ReLU(), nn.Tanh()], label="act"))).size
        2
    """
    space = getattr(model_or_net, "space", None)
    if isinstance(space, SearchSpace):
        return space
    traced = model_or_net if isinstance(model_or_net, TracedModel) else trace(model_or_net)
    return space_of(traced)


def space_of(traced: TracedModel) -> SearchSpace:
    """The search space of a traced model."""
    places = places_of(traced.graph_modules.values())
    modules: dict[str, Choice] = {}
    paths: dict[str, list[str]] = {}
    for place in places:
        module = traced.get_submodule(place.path)
        assert isinstance(module, Choice)
        modules.setdefault(place.label, module)
        if place.path not in paths.setdefault(place.label, []):
            paths[place.label].append(place.path)
    choices = [
        SpaceChoice(
            label,
            module.kind,
            module.candidates if module.kind == "layer" else tuple(range(len(module.candidates))),
            module.n_chosen,
            tuple(paths[label]),
            module.relaxed_only,
            edges.pop() if len(edges := {p.edges for p in places if p.label == label}) == 1 else (),
            _zeros(traced, paths[label]),
            next(p.sources for p in places if p.label == label),
        )
        for label, module in modules.items()
    ]
    return SearchSpace(choices, places)


def _zeros(traced: TracedModel, paths: Sequence[str]) -> tuple[str, ...]:
    """The candidates that add nothing at all places of a label.

    They give zeros, or the residual connection is inside the other candidates, all of which add to
    their input, and they give that input alone.
    """
    choices = [traced.get_submodule(path) for path in paths]
    layers = [choice for choice in choices if isinstance(choice, LayerChoice)]
    return tuple(
        name
        for name in (layers[0].candidates if layers else ())
        if all(_adds_nothing(choice, name) for choice in layers)
    )


def _adds_nothing(choice: LayerChoice, name: str) -> bool:
    candidate = choice._modules[name]
    if candidate is None or not is_identity(candidate):
        return gives_zeros(candidate)
    others = [m for _, m in choice.named_candidates() if not is_identity(m)]
    return bool(others) and all(map(adds_to_input, others))
