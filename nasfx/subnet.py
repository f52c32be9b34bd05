"""`finalize`: one architecture as a static module, with a certificate of what was checked."""

from __future__ import annotations

import copy as copying
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nasfx.architecture import Architecture
from nasfx.choice import activated
from nasfx.collapsing import collapsed
from nasfx.errors import NasfxError, SearchError, SpaceError, VerifyError
from nasfx.ops.select import unmoved_buffers
from nasfx.passes import Canonicalize, RemoveDeadCode
from nasfx.rewriting.graph import ModelGraph, clone_tree, provenance
from nasfx.rewriting.passes import PassContext
from nasfx.rewriting.printing import format_node
from nasfx.space import SearchSpace, space_of
from nasfx.supernet import Supernet
from nasfx.tracing import TracedModel, as_tuple, trace, trace_active

_NOT_RUN = "not run: no example inputs"


class DualSubnet(fx.GraphModule):
    """A subnet whose code differs between train and eval mode in more than a dropout.

    `train()` and `eval()` put the graph of the mode in place. Pickle keeps one graph, so it is
    refused: a static module for one mode is `fx.GraphModule(subnet, subnet.graph)`.
    """

    def train(self, mode: bool = True) -> DualSubnet:
        """Switch the mode, and with it the graph."""
        super().train(mode)
        graphs = self.__dict__.get("mode_graphs")
        if graphs is not None and self.graph is not graphs[mode]:
            self.graph = graphs[mode]
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        raise NasfxError(
            "this subnet's code differs between train() and eval(), and pickle keeps one graph: "
            "pickle fx.GraphModule(subnet, subnet.graph) for the current mode, or save its "
            "state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> DualSubnet:
        raise NasfxError(
            "this subnet's code differs between train() and eval(), and a copy keeps one graph: "
            "call nasfx.finalize again for another subnet"
        )


def finalize(
    net_or_model: nn.Module,
    arch: Mapping[str, Any] | None = None,
    *,
    copy: bool = True,
    example_inputs: Any = None,
) -> fx.GraphModule:
    """Collapse a supernet, or a model with choices, into the subnet of one architecture.

    The subnet is an ordinary `fx.GraphModule` with the weights as they are, under the model's own
    names, in the mode that the net is in. Nothing of nasfx is in it: it runs, pickles, exports and
    compiles without.

    Args:
        net_or_model: what `transform` made, or a model that was not transformed.
        arch: the architecture; by default what the net derives. A model needs one.
        copy: give the subnet tensors of its own. With False it shares them with the net, and
            training either trains both.
        example_inputs: for the parts of the certificate that run the nets; by default those that
            `transform` was given.

    Returns:
        The subnet, with `architecture` (a plain dict) and `certificate` (a plain dict):

        - "structure": the graph equals, node for node, an independent trace of the model with that
          path active (not run where passes of your own have rewritten the choice graph);
        - "tensors": every tensor equals the net's byte for byte;
        - "outputs": bitwise equal to the eager model's in eval mode, on the example inputs;
        - "supernet_difference": the largest difference to the supernet with one-hot gates, with
          "supernet_exactness", what its passes promise. Measured, not judged.

        What could not be run says "not run".

    Raises:
        SpaceError: no choices, or no architecture of the space.
        SearchError: no architecture is given and none can be derived.
        VerifyError: a part of the certificate fails; nothing is returned then.

    Example:
        >>> from nasfx import LayerChoice
        >>> model = nn.Sequential(LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act"))
        >>> finalize(model, {"act": "tanh"}, example_inputs=torch.ones(2)).certificate["outputs"]
        'passed'
    """
    net = net_or_model if isinstance(net_or_model, Supernet) else None
    if net is not None:
        if net.in_step:
            raise SearchError(
                "finalize inside a step, where gradients are switched off; close it first"
            )
        traced, space = net.traced, net.space
        inputs = traced.example_inputs if example_inputs is None else as_tuple(example_inputs)
        architecture = net.derive() if arch is None else space.validate(arch)
    else:
        traced, space, inputs, architecture = _of_model(net_or_model, arch, example_inputs)
    collapsed_graphs = {
        mode: collapsed(net.choice_graph(mode) if net is not None else gm, architecture)
        for mode, gm in traced.graph_modules.items()
    }
    training = traced.training if net is None else net.training
    subnet = _static(collapsed_graphs, training, copy=copy)
    certificate = {
        "structure": _check_structure(traced, architecture, collapsed_graphs),
        "tensors": _check_tensors(collapsed_graphs["train"], subnet),
        **_check_outputs(traced, architecture, subnet, inputs),
        **_compare_supernet(net, architecture, subnet, inputs),
    }
    kept: dict[str, Any] = {"architecture": dict(architecture), "certificate": certificate}
    kept["_origins"] = _origins(subnet.graph, architecture)
    # fx carries attributes named here through deepcopy; pickle keeps them as they are.
    subnet.meta["_user_preserved_attributes"] = kept
    for name, value in kept.items():
        setattr(subnet, name, value)
    return subnet


def _of_model(
    model: nn.Module, arch: Mapping[str, Any] | None, example_inputs: Any
) -> tuple[TracedModel, SearchSpace, tuple[Any, ...] | None, Architecture]:
    traced = model if isinstance(model, TracedModel) else trace(model, example_inputs)
    space = space_of(traced)
    if not space.choices:
        raise SpaceError(
            f"{type(model).__name__} has no choices, so there is nothing to finalize; "
            "it is its own subnet"
        )
    if arch is None:
        raise SearchError(
            "a model that was not transformed has no architecture of its own: give one, "
            "nasfx.finalize(model, arch), or a net from nasfx.transform"
        )
    for gm in traced.graph_modules.values():
        Canonicalize()(gm, PassContext(), check=False)
    return traced, space, traced.example_inputs, space.validate(arch)


# -- building --------------------------------------------------------------------------------------


def _static(graphs: Mapping[str, ModelGraph], training: bool, *, copy: bool) -> fx.GraphModule:
    """A plain GraphModule with modules of its own, only those that its graphs name."""
    source = graphs["train"]
    root = nn.Module()
    root.training = training
    memo: dict[int, nn.Module] = {}
    nodes = [node for gm in graphs.values() for node in gm.graph.nodes]
    called = dict.fromkeys(str(n.target) for n in nodes if n.op == "call_module")
    for path in called:
        parent, _, name = path.rpartition(".")
        module = source.get_submodule(path)
        _container(root, source, parent)._modules[name] = clone_tree(module, memo)
    for path in dict.fromkeys(str(n.target) for n in nodes if n.op == "get_attr"):
        parent, _, name = path.rpartition(".")
        if not any(parent == leaf or parent.startswith(f"{leaf}.") for leaf in called):
            _take_tensor(_container(root, source, parent), source.get_submodule(parent), name, copy)
    if copy:
        root = copying.deepcopy(root)
    plain = {mode: _plain_graph(gm) for mode, gm in graphs.items()}
    kind = DualSubnet if len(graphs) > 1 else fx.GraphModule
    subnet = kind(nn.Module(), fx.Graph(), "Subnet")
    for own in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training"):
        subnet.__dict__[own] = root.__dict__[own]
    subnet.graph = plain["train"] if root.training else plain.get("eval", plain["train"])
    if len(graphs) > 1:
        subnet.__dict__["mode_graphs"] = {True: plain["train"], False: plain["eval"]}
    return subnet


def _container(root: nn.Module, source: nn.Module, path: str) -> nn.Module:
    """The module at `path` of `root`, made of plain modules where it is missing."""
    module = root
    for name in path.split(".") if path else ():
        source = source.get_submodule(name)
        child = module._modules.get(name)
        if child is None:
            child = module._modules[name] = nn.Module()
            child.training = source.training
        module = child
    return module


def _take_tensor(container: nn.Module, source: nn.Module, name: str, copy: bool) -> None:
    """Let `container` hold the tensor that `source` holds under `name`."""
    kinds = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    if not copy and (name in source._parameters or name in source._buffers):
        # The dictionaries themselves, so that a tensor rebound there is rebound here.
        container.__dict__.update({kind: source.__dict__[kind] for kind in kinds})
    elif name in source._parameters:
        container.register_parameter(name, source._parameters[name])
    else:
        persistent = name in source._buffers and name not in source._non_persistent_buffers_set
        container.register_buffer(name, getattr(source, name), persistent=persistent)


def _plain_graph(gm: ModelGraph) -> fx.Graph:
    """A graph of torch's own class whose provenance is plain data."""
    graph = fx.Graph()
    new_of: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, new_of)
    graph.output(result)
    for old, new in new_of.items():
        new.meta = {"nasfx": asdict(provenance(old))}
        new.meta |= {key: old.meta[key] for key in ("shape",) if key in old.meta}
    return graph


def _origins(graph: fx.Graph, arch: Architecture) -> list[tuple[str, str, str]]:
    """Where each call came from, as plain data that pickle keeps, unlike the meta of nodes."""
    found: list[tuple[str, str, str]] = []
    for node in _calls(graph):
        origin = node.meta["nasfx"]
        module = str(node.target) if node.op == "call_module" else origin["module"]
        label, choice = origin["label"], ""
        if label in arch:
            decision = arch.decision(label)
            value = decision if isinstance(decision, str) else ", ".join(map(str, decision))
            choice = f"{label}: {value}"
        found.append((_called(node), module, choice))
    return found


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op.startswith("call_")]


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def origins(gm: fx.GraphModule) -> dict[fx.Node, tuple[str, str]]:
    """The module path and the choice ("label: decision", or "") of each call of a subnet.

    Empty for other graph modules, and where the graph has other calls than `finalize` left in it.
    """
    recorded = getattr(gm, "_origins", [])
    calls = _calls(gm.graph)
    if [_called(node) for node in calls] != [called for called, _, _ in recorded]:
        return {}
    return {n: (module, choice) for n, (_, module, choice) in zip(calls, recorded, strict=True)}


# -- the certificate -------------------------------------------------------------------------------


def _check_structure(
    traced: TracedModel, arch: Architecture, graphs: Mapping[str, ModelGraph]
) -> str:
    if traced.rewritten_by:
        return f"not run: the graph was rewritten by {', '.join(traced.rewritten_by)}"
    with activated(traced.origin, arch):
        independent = trace_active(traced.origin, traced.example_inputs, traced.leaf_modules)
    first_path = {id(m): path for path, m in traced.origin.named_modules()}
    for mode in ("train", "eval"):
        collapsed_gm = graphs.get(mode, graphs["train"])
        other = independent.graph_modules.get(mode, independent.graph_modules["train"])
        Canonicalize()(other, PassContext(), check=False)
        RemoveDeadCode()(other, PassContext(), check=False)
        mine, theirs = (_described(gm, traced.origin, first_path) for gm in (collapsed_gm, other))
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), -1)
            error = VerifyError(
                "the collapsed graph differs from an independent trace of the model with that path "
                f"active, in {mode} mode; this is a mistake in nasfx"
            )
            for name, gm in (("collapsed", collapsed_gm), ("traced", other)):
                nodes = list(gm.graph.nodes)
                error.add_note(f"{name}: {format_node(nodes[min(at, len(nodes) - 1)])}")
            raise error
    return "passed"


def _described(gm: fx.GraphModule, origin: nn.Module, first_path: Mapping[int, str]) -> list[Any]:
    """The nodes without their names: what they compute, from which, and with whose tensors."""
    index = {node: i for i, node in enumerate(gm.graph.nodes)}
    described: list[Any] = []
    for node in gm.graph.nodes:
        target: Any = node.target
        if node.op in ("call_module", "get_attr"):
            target = _canonical_target(gm, str(node.target), origin, first_path)
        args = fx.map_arg((node.args, node.kwargs), lambda n: f"%{index[n]}")
        described.append((node.op, target, repr(args)))
    return described


def _canonical_target(
    gm: fx.GraphModule, target: str, origin: nn.Module, first_path: Mapping[int, str]
) -> str:
    if target.split(".")[-2:-1] == ["_traced"]:
        value = _attribute(gm, target)
        return repr(value.tolist()) if isinstance(value, Tensor) else repr(value)
    try:
        return first_path[id(origin.get_submodule(target))]
    except AttributeError:
        parent, _, name = target.rpartition(".")
        return f"{first_path[id(origin.get_submodule(parent))]}:{name}"


def _attribute(module: nn.Module, target: str) -> Any:
    parent, _, name = target.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _check_tensors(source: nn.Module, subnet: nn.Module) -> str:
    tensors = [*subnet.named_parameters(), *subnet.named_buffers()]
    for name, tensor in tensors:
        if not same_bytes(tensor, _attribute(source, name)):
            raise VerifyError(
                f"tensor {name} of the subnet differs from the net's; a mistake in nasfx"
            )
    return "passed"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one dtype and shape and the same bytes; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(
        a.detach().contiguous().reshape(-1).view(torch.uint8),
        b.detach().contiguous().reshape(-1).view(torch.uint8),
    )


def _check_outputs(
    traced: TracedModel, arch: Architecture, subnet: fx.GraphModule, inputs: tuple[Any, ...] | None
) -> dict[str, Any]:
    if inputs is None:
        return {"outputs": _NOT_RUN}
    if traced.rewritten_by:
        return {"outputs": f"not run: rewritten by {', '.join(traced.rewritten_by)}"}
    with activated(traced.origin, arch), evaluating(traced.origin):
        expected = pytree.tree_leaves(traced.origin(*inputs))
    with evaluating(subnet):
        found = pytree.tree_leaves(subnet(*inputs))
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        equal = same_bytes(a, b) if isinstance(a, Tensor) else a == b
        if not equal:
            raise VerifyError(
                f"output {i} of the subnet differs from the eager model's in eval mode; a mistake "
                "in nasfx"
            )
    return {"outputs": "passed"}


def _compare_supernet(
    net: Supernet | None, arch: Architecture, subnet: fx.GraphModule, inputs: tuple[Any, ...] | None
) -> dict[str, Any]:
    if net is None:
        return {"supernet_difference": "not run: no supernet"}
    if inputs is None:
        return {"supernet_difference": _NOT_RUN}
    with evaluating(net):
        found = pytree.tree_leaves(net.run_one_hot(arch, *inputs))
    with evaluating(subnet):
        expected = pytree.tree_leaves(subnet(*inputs))
    differences = [
        float((a - b).abs().max())
        for a, b in zip(expected, found, strict=True)
        if isinstance(a, Tensor) and a.numel()
    ]
    loose = [f"{r.name}: {r.exactness}" for r in net.history.records if r.stage == "SUPERNET"]
    return {"supernet_difference": max(differences, default=0.0), "supernet_exactness": loose}


@contextmanager
def evaluating(module: nn.Module) -> Generator[None, None, None]:
    """Eval mode, no gradients and a fixed seed; modes, buffers and seeds return afterwards."""
    devices = [p.device for p in module.parameters() if p.device.type == "cuda"][:1]
    rng = torch.random.fork_rng(devices)
    with torch.no_grad(), unmoved_buffers(module), rng, kept_modes(module):
        module.eval()
        torch.manual_seed(0)
        yield


@contextmanager
def kept_modes(module: nn.Module) -> Generator[None, None, None]:
    """After the block `module`, and what a net holds beside its children, has its modes again."""
    held = [module]
    if isinstance(module, Supernet):
        held += [module.traced, module.traced.origin]
    modes = [(m, m.training) for root in held for m in root.modules()]
    try:
        yield
    finally:
        if isinstance(module, DualSubnet):
            module.train(modes[0][1])  # for its graph
        for m, training in modes:
            m.training = training
