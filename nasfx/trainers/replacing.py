"""`replace_layer_choice` and `replace_input_choice`: other modules in the place of choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nasfx.choice import Choice, InputChoice, LayerChoice, default_label, named_choices
from nasfx.errors import SpaceError

Replaced = list[tuple[str, nn.Module]]


def replace_layer_choice(
    root_module: nn.Module,
    init_fn: Callable[[Any], nn.Module],
    modules: dict[str, nn.Module] | None = None,
) -> Replaced:
    """Put `init_fn(choice)` in the place of every `LayerChoice` below `root_module`.

    Outer choices come first, and the search goes on in what they were replaced by: nested choices
    are replaced, too. A module that is found twice is replaced by one and the same. A new module
    may hold the choice that it replaces: that one stays there.

    Args:
        root_module: a module, which is changed.
        init_fn: makes the new module of a choice.
        modules: by label, what replaces the choices is written into it; of several choices with one
            label, the first.

    Returns:
        (label, new module) of every choice, in order. The label of an unlabelled choice is its
        path, with "/" for ".".

    Raises:
        SpaceError: choices with one label have other candidates; `modules` has the label already;
            `root_module` is a choice itself; `init_fn` returns no module.

    Example:
        >>> net = nn.Sequential(LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act"))
        >>> replace_layer_choice(net, lambda choice: nn.ModuleList(choice.children()))[0][0], net
        ('act', Sequential(
          (0): ModuleList(
            (0): ReLU()
            (1): Tanh()
          )
        ))
    """
    return _Replacing(LayerChoice, root_module, init_fn, modules).run()


def replace_input_choice(
    root_module: nn.Module,
    init_fn: Callable[[Any], nn.Module],
    modules: dict[str, nn.Module] | None = None,
) -> Replaced:
    """Put `init_fn(choice)` in the place of every `InputChoice`; see `replace_layer_choice`.

    Example:
        >>> net = nn.Sequential(InputChoice(2, label="skips"))
        >>> [label for label, _ in replace_input_choice(net, lambda choice: nn.Identity())]
        ['skips']
    """
    return _Replacing(InputChoice, root_module, init_fn, modules).run()


class _Replacing:
    def __init__(
        self,
        kind: type[Choice],
        root: nn.Module,
        init_fn: Callable[[Any], nn.Module],
        modules: dict[str, nn.Module] | None,
    ) -> None:
        if isinstance(root, kind):
            raise SpaceError(
                f"root_module is itself a {kind.__name__}, which only a module around it can "
                "replace: nn.Sequential(root_module)"
            )
        self.kind, self.root, self.init_fn = kind, root, init_fn
        self.modules: dict[str, nn.Module] = {} if modules is None else modules
        self.known = set(self.modules)
        self.labels = {c: c.label or default_label(path) for path, c in named_choices(root)}
        self.of_label: dict[str, Choice] = {}
        self.new: dict[nn.Module, nn.Module] = {}
        self.visited: set[nn.Module] = set()
        for choice, label in self.labels.items():  # before anything is changed
            if isinstance(choice, kind):
                self._check(choice, label)

    def run(self) -> Replaced:
        """Replace all; what was replaced."""
        return list(self._walk(self.root, "", ()))

    def _walk(
        self, module: nn.Module, path: str, within: tuple[nn.Module, ...]
    ) -> Iterator[tuple[str, nn.Module]]:
        """Replace what is below `module`, which stands in the replacements of `within`."""
        if module in self.visited:
            return
        self.visited.add(module)
        # None, and one module under two names, among them: both names get the new one.
        for name, child in list(module._modules.items()):
            where = f"{path}.{name}" if path else name
            if child is None:
                continue
            if not isinstance(child, self.kind) or child in within:
                yield from self._walk(child, where, within)
                continue
            if child not in self.new:
                label = self.labels.get(child) or child.label or default_label(where)
                self.new[child] = self._replacement(child, label)
                yield label, self.new[child]
            setattr(module, name, self.new[child])
            yield from self._walk(self.new[child], where, (*within, child))

    def _check(self, choice: Choice, label: str) -> None:
        """Refuse a label that stands for something else already."""
        if label in self.known:
            raise SpaceError(
                f"{choice.described}: modules has a replacement for {label!r} from another call; "
                "choices that share a label must be replaced in one call"
            )
        first = self.of_label.setdefault(label, choice)
        if _shape(first) != _shape(choice):
            raise SpaceError(
                f"{choice.described}: label {label!r} is also that of {first.described}, whose "
                f"candidates are {_shape(first)}, not {_shape(choice)}"
            )

    def _replacement(self, choice: Choice, label: str) -> nn.Module:
        """The new module of `choice`."""
        self._check(choice, label)
        new = self.init_fn(choice)
        if not isinstance(new, nn.Module):
            raise SpaceError(
                f"{choice.described}: init_fn returned a {type(new).__name__}, not an nn.Module"
            )
        self.modules.setdefault(label, new)
        return new


def _shape(choice: Choice) -> tuple[Any, ...]:
    """What choices of one label must have in common."""
    return choice.candidates, choice.n_chosen, choice.relaxed_only
