"""The tracer: runs `forward` on fx proxies, and gives each candidate a graph of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.utils import _pytree as pytree

from nasfx.choice import Choice, InputChoice, LayerChoice, TensorLeaf, default_label
from nasfx.errors import SpaceError, TraceError, error_site, user_site
from nasfx.rewriting.effects import aliased, mutated
from nasfx.rewriting.graph import Provenance, has_hooks, join, set_provenance
from nasfx.scratch import Scratch, context, restore_rng, rng_state


@dataclass
class Call:
    """How a choice is called, and the traced candidates (None: a leaf, called as it is)."""

    structure: tuple[Any, ...]
    candidates: dict[str, Frame | None] = field(default_factory=dict)


@dataclass
class Frame:
    """One graph being traced: the model's own, or a candidate's, relative to its root."""

    root: nn.Module
    path: str
    graph: fx.Graph
    modules: dict[nn.Module, str]
    tensors: dict[int, str]
    proxies: dict[str, Proxy] = field(default_factory=dict)
    added: dict[str, torch.Tensor | nn.Module] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)

    @classmethod
    def at(cls, root: nn.Module, path: str) -> Frame:
        """A frame for `root`, which stands at `path` of the model."""
        modules: dict[nn.Module, str] = {}
        tensors: dict[int, str] = {}
        for name, module in root.named_modules():
            modules[module] = name
            own = module._parameters | module._buffers
            own |= {k: v for k, v in module.__dict__.items() if isinstance(v, torch.Tensor)}
            for key, tensor in own.items():
                if tensor is not None:
                    tensors.setdefault(id(tensor), join(name, key))
        return cls(root, path, fx.Graph(), modules, tensors)

    def frames(self) -> Iterator[Frame]:
        """This frame and those of the candidates below it, each once."""
        seen: set[int] = set()
        stack: list[Frame] = [self]
        while stack:
            frame = stack.pop()
            if id(frame) in seen:
                continue
            seen.add(id(frame))
            yield frame
            candidates = [c for call in frame.calls.values() for c in call.candidates.values()]
            stack.extend(c for c in reversed(candidates) if c is not None)

    def add(self, kind: str, value: torch.Tensor | nn.Module) -> str:
        """Keep a constant or a module that the user's tree does not hold; its target."""
        name = f"{kind}_{len(self.added)}"
        self.added[name] = value
        return f"_traced.{name}"


class ModelTracer(fx.Tracer):
    """Traces a scratch clone of a model; every choice is one node, every failure says where."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        opaque: dict[str, str],
        leaf_modules: Sequence[type | str],
        n_inputs: int | None,
        through_choices: bool,
        scratch: Scratch,
    ) -> None:
        super().__init__()
        self.scratch = scratch
        self.through_choices = through_choices
        self.opaque = opaque
        self.leaf_modules = leaf_modules
        self.n_inputs = n_inputs
        self.frames: list[Frame] = []
        self.calls: dict[int, Call] = {}
        self.owners: list[str] = [""]
        self.label, self.part = "", ""

    def run(self) -> Frame:
        """Trace the scratch model and everything below it."""
        root = self.scratch.model
        self.choosing = {
            id(module)
            for module in root.modules()
            if any(isinstance(inner, Choice) for inner in module.modules())
        }
        self.frames = [Frame.at(root, "")]
        self.context = context()
        state = rng_state()
        try:
            graph = self.trace(root)
        except (TraceError, SpaceError):
            raise
        except Exception as error:
            raise _cannot_trace("the model's forward", error) from error
        finally:
            changed = restore_rng(state)
        if moved := self.scratch.moved(root):
            raise _cannot_trace(f"{type(root).__name__}.forward", None, moved)
        if changed:
            raise TraceError(
                f"{type(root).__name__}.forward draws random numbers outside of the graph; tracing "
                "would freeze them. Draw them with an operation on an input (torch.rand_like), or "
                "move the code to a module of its own without choices"
            )
        self.frames[0].graph = graph
        return self.frames[0]

    # -- what fx calls ---------------------------------------------------------------------------

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the arguments; defaults that no example input covers are constants."""
        parameters = list(inspect.signature(root_fn).parameters.values())[1:]
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        positional: list[Any] = [self.root]
        keywords: dict[str, Any] = {}
        required = [p.default is p.empty for p in parameters]
        for i, p in enumerate(parameters):
            given = self.n_inputs is not None and i < self.n_inputs
            if p.default is p.empty or (given and p.kind is not p.KEYWORD_ONLY):
                # Python allows no default before an input without one.
                default = () if any(required[i:]) else (p.default,)
                value = self.create_proxy("placeholder", p.name, default, {})
            else:
                value = p.default
            if p.kind is p.KEYWORD_ONLY:
                keywords[p.name] = value
            else:
                positional.append(value)

        def call(*args: Any) -> Any:
            return root_fn(*args, **keywords)

        return call, positional

    def create_node(
        self,
        kind: str,
        target: Any,
        args: Any,
        kwargs: Any,
        name: str | None = None,
        type_expr: Any = None,
    ) -> fx.Node:
        """Create a node with its provenance."""
        if context() != self.context:
            raise TraceError(
                f"{user_site()}: the code runs under torch.no_grad, inference_mode or autocast, "
                "which a graph would lose"
            )
        node = self.graph.create_node(kind, target, args, kwargs, name, type_expr)
        if (written := mutated(node)) is not None and _is_constant(written):
            raise TraceError(
                f"{user_site()}: a tensor that forward made is written in place; in a graph it is "
                "one constant for all calls. Make it from an input (x.new_zeros, "
                "torch.zeros_like), or write it with an operation that is not in place"
            )
        site = user_site(ModelTracer.run.__code__)
        origin = Provenance(site, self.owners[-1], self.label, self.part)
        return set_provenance(node, origin)

    def create_arg(self, a: Any) -> Any:
        """Tensors become get_attr nodes: by the user's name, or as constants of the graph's own."""
        if isinstance(a, torch.Tensor):
            frame = self.frames[-1]
            name = frame.tensors.get(id(a))
            if name is None:
                if a.requires_grad or any(id(a) in outer.tensors for outer in self.frames):
                    raise TraceError(
                        f"{user_site()}: a parameter or buffer is read that does not belong to "
                        f"{frame.path or 'the model'}; a graph would take it for a constant. Hand "
                        "it over as an argument"
                    )
                name = frame.add("constant", a.detach())
                frame.tensors[id(a)] = name
                frame.proxies[f"keep {name}"] = a  # type: ignore[assignment]  # the id stays taken
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers are proxies, one node for each in each graph."""
        if not isinstance(attr_val, torch.Tensor) or not self.frames:
            return attr_val
        frame = self.frames[-1]
        name = frame.tensors.get(id(attr_val))
        if name is None:
            return attr_val
        if name not in frame.proxies:
            frame.proxies[name] = self.create_proxy("get_attr", name, (), {})
        return frame.proxies[name]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """A choice, a leaf, or a module to trace through."""
        frame = self.frames[-1]
        path = frame.modules.get(m)
        if path is None:
            raise TraceError(
                f"{user_site()}: a {type(m).__name__} is called that is no submodule of "
                f"{frame.path or 'the model'}"
            )
        if isinstance(m, Choice) and not self.through_choices:
            return self._call_choice(m, path, args, kwargs)
        full = join(frame.path, path)
        if self._leaf(m, full):
            return self.create_proxy("call_module", path, args, kwargs)
        result, reason = self._attempt(m, full, lambda: forward(*args, **kwargs))
        if reason:
            return self.create_proxy("call_module", path, args, kwargs)
        return result

    # -- our own ---------------------------------------------------------------------------------

    def _leaf(self, m: nn.Module, full: str) -> bool:
        chooses = id(m) in self.choosing
        named = full in self.leaf_modules or isinstance(
            m, tuple(t for t in self.leaf_modules if isinstance(t, type))
        )
        hooked = has_hooks(m)
        standard = self.is_leaf_module(m, full)
        if named and chooses:
            raise TraceError(f"{full} is among leaf_modules but holds a choice")
        if hooked and chooses:
            raise TraceError(
                f"{full} ({type(m).__name__}) holds a choice and has forward or backward hooks, "
                "which a graph would lose; remove them, or put them on a module without choices"
            )
        if hooked and not standard:
            self.opaque.setdefault(full, "has hooks, which tracing through it would lose")
        return (named or standard or full in self.opaque) and not chooses

    def _attempt(self, m: nn.Module, full: str, run: Callable[[], Any]) -> tuple[Any, str]:
        """Run part of a forward; on failure take back its nodes and return the reason."""
        graph = self.graph
        before = next(reversed(graph.nodes), None)
        state = rng_state()
        reason, failure = "", None
        self.owners.append(full)
        result = None
        try:
            result = run()
        except Exception as error:
            if isinstance(error, TraceError | SpaceError) and id(m) in self.choosing:
                raise
            site = error_site(error)
            reason, failure = f"{site}: {type(error).__name__}: {error}", error
        finally:
            self.owners.pop()
        moved = self.scratch.moved(m)
        if restore_rng(state) and not reason:
            reason = "draws random numbers outside of the graph"
        reason = reason or moved
        if not reason:
            return result, ""
        if id(m) in self.choosing:
            what = f"{full} ({type(m).__name__})"
            raise _cannot_trace(what, failure, reason) from failure
        self.opaque[full] = reason
        proxies = self.frames[-1].proxies
        for node in reversed(graph.nodes):
            if node is before:
                break
            graph.erase_node(node)
            if node.op == "get_attr" and getattr(proxies.get(node.target), "node", None) is node:
                del proxies[node.target]
        return None, reason

    def _call_choice(self, m: Choice, path: str, args: Any, kwargs: Any) -> Any:
        frame = self.frames[-1]
        if has_hooks(m):
            raise TraceError(
                f"{m.described} has forward or backward hooks, which the rewritten graph would "
                "lose; remove them, or put them on a module without choices"
            )
        # A tensor that forward made, or a buffer, is an input of the choice like any other.
        args, kwargs = pytree.tree_map(self._as_proxy, (args, kwargs))
        leaves, spec = pytree.tree_flatten((args, kwargs))
        structure = (spec, *(TensorLeaf if isinstance(leaf, Proxy) else leaf for leaf in leaves))
        if isinstance(m, InputChoice):
            _check_inputs(m, args, kwargs)
        self._record_call(m, path, structure)
        outer = self.label, self.part
        self.label, self.part = m.label or default_label(join(frame.path, path)), ""
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.label, self.part = outer

    def _as_proxy(self, leaf: Any) -> Any:
        return Proxy(self.create_arg(leaf), self) if isinstance(leaf, torch.Tensor) else leaf

    def _record_call(self, m: Choice, path: str, structure: tuple[Any, ...]) -> None:
        """Trace the candidates at the first call; later calls must have the same structure."""
        frame = self.frames[-1]
        call = self.calls.get(id(m))
        if call is None:
            call = self.calls[id(m)] = Call(structure)
            if isinstance(m, LayerChoice):
                for name, candidate in m.named_candidates():
                    full = join(frame.path, path, name)
                    call.candidates[name] = self._candidate(m, name, candidate, full, call)
        elif not _equal(call.structure, structure):
            raise TraceError(
                f"{user_site()}: {m.described} is called again with other arguments; one choice "
                "must be called with the same number of tensors and the same constants everywhere"
            )
        frame.calls.setdefault(path, call)

    def _candidate(
        self, choice: LayerChoice, name: str, m: nn.Module, full: str, call: Call
    ) -> Frame | None:
        if isinstance(m, InputChoice):
            raise TraceError(
                f"{m.described} is itself a candidate; wrap it in a module whose forward calls it"
            )
        if isinstance(m, LayerChoice):
            self._record_call(m, self.frames[-1].modules[m], call.structure)
            return None
        if self._leaf(m, full):
            return None
        spec, *constants = call.structure
        sub = Frame.at(m, full)
        outer_graph, outer_names = self.graph, (self.label, self.part)
        self.frames.append(sub)
        self.graph = sub.graph
        self.label = choice.label or default_label(full.rpartition(".")[0])
        self.part = name
        n_tensors = sum(c is TensorLeaf for c in constants)
        try:
            names = iter(["x"] if n_tensors == 1 else [f"x{i}" for i in range(n_tensors)])
            values = [
                self.create_proxy("placeholder", next(names), (), {}) if c is TensorLeaf else c
                for c in constants
            ]
            args, kwargs = pytree.tree_unflatten(values, spec)
            result, reason = self._attempt(
                m, full, lambda: self.create_arg(m.forward(*args, **kwargs))
            )
            if reason:
                return None
            self.owners.append(full)
            self.create_node("output", "output", (result,), {})
            self.owners.pop()
        finally:
            self.frames.pop()
            self.graph = outer_graph
            self.label, self.part = outer_names
        return sub


def _check_inputs(choice: InputChoice, args: Any, kwargs: Any) -> None:
    inputs = args[0] if len(args) == 1 and not kwargs else None
    if not isinstance(inputs, list | tuple) or not all(isinstance(i, Proxy) for i in inputs):
        raise TraceError(
            f"{user_site()}: {choice.described} must be called with one list of tensors that the "
            "calling code builds itself"
        )
    if len(inputs) != choice.n_candidates:
        raise SpaceError(
            f"{user_site()}: {choice.described} is called with {len(inputs)} inputs but has "
            f"n_candidates={choice.n_candidates}"
        )


def _cannot_trace(what: str, error: BaseException | None, reason: str = "") -> TraceError:
    site = error_site(error) if error is not None else ""
    detail = reason or f"{site}: {type(error).__name__}: {error}"
    return TraceError(
        f"cannot trace {what}: {detail}\n"
        "A graph has no control flow that depends on tensor values or shapes, and no Python code "
        "on "
        "tensors' contents. Move that code into a module of its own that holds no choice (it then "
        "becomes one opaque node), name such a module in leaf_modules, or write it with torch "
        "operations (torch.where, torch._assert)."
    )


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(
        x is y or (type(x) is type(y) and not isinstance(x, torch.Tensor) and x == y)
        for x, y in zip(a, b, strict=True)
    )


def _is_constant(node: fx.Node) -> bool:
    """Whether the value is, or views, a tensor that forward made outside of the graph."""
    while (of := aliased(node)) is not None:
        node = of
    return node.op == "get_attr" and str(node.target).startswith("_traced.")
