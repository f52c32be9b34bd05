"""The Python text of a graph module: its modules, its tensors and its graph, a line per node."""

from __future__ import annotations

import functools
import keyword
import operator
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import CodeGen, magic_methods

from nasfx.errors import ExportError
from nasfx.export.constructors import constructor, function_name, literal, subscript
from nasfx.rewriting.graph import join, provenance

MARK = "written by nasfx as source"
_GLOBALS = ("self", "torch", "nn", "F", "operator", "math", "torchvision")
_CONTAINERS = (
    nn.Module,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)

_GROUP = '''

class Group(nn.Module):
    """Modules and tensors under their own names; it computes nothing itself."""

    def __init__(self, /, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
'''

_LOAD = '''

def load(folder: str | Path = Path(__file__).parent) -> Subnet:
    """Build the network and load its weights, on the CPU, in the mode it was written in."""
    with torch.random.fork_rng(devices=[]):  # the random first weights are overwritten below
        model = Subnet()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    values = load_file(Path(folder) / "weights.safetensors")
    if tensors.keys() != values.keys():
        raise KeyError(f"weights of another network: {sorted(tensors.keys() ^ values.keys())}")
    for name, value in values.items():
        # This also sets the dtype, and what is tied stays tied. The copy is aligned, which a tensor
        # in the file need not be: kernels round differently on unaligned memory.
        tensors[name].data = value.clone()
    return model
'''

# The layout is part of the result: another one may run another kernel, which rounds differently.
_LAYOUT = """    channels_last = [
{items}    ]
    for name in channels_last:
        tensors[name].data = tensors[name].to(memory_format=torch.channels_last)
"""


def _highest(items: Mapping[str, bool]) -> list[str]:
    """The highest paths under which every item is flagged."""
    blocked: set[str] = set()
    for path, flag in items.items():
        if not flag:
            blocked.update(_prefixes(path))
    flagged = (path for path, flag in items.items() if flag)
    return list(dict.fromkeys(next(p for p in _prefixes(q) if p not in blocked) for q in flagged))


def _prefixes(path: str) -> Iterator[str]:
    yield ""
    parts = path.split(".") if path else []
    for i in range(len(parts)):
        yield ".".join(parts[: i + 1])


def _is_plain(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


class Source:
    """The text of one graph module, and the tensors that belong beside it."""

    def __init__(self, subnet: fx.GraphModule) -> None:
        self.root = subnet
        self.graph = subnet.graph
        if type(self.graph._codegen) is not CodeGen:
            raise ExportError(
                f"the graph takes its arguments by a {type(self.graph._codegen).__name__}: "
                "trace the subnet without concrete_args"
            )
        lazy = [name for name, p in subnet.named_parameters() if nn.parameter.is_lazy(p)]
        if lazy:
            raise ExportError(f"{lazy[0]} has no shape yet: run the subnet once")
        targets = {str(n.target) for n in self.graph.nodes if n.op == "call_module"}
        called = [subnet.get_submodule(path) for path in sorted(targets)]
        # A Sequential that is called calls its children.
        self.called = {id(m) for outer in called for m in _run_by(outer)}
        uses = Counter(id(m) for outer in subnet.modules() for m in outer._modules.values())
        self.shared = {key for key, n in uses.items() if n > 1 and key != id(None)}
        self.locals: dict[int, str] = {}
        self.made: set[int] = set()  # what a constructor made, with all that is within it
        self.lines: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.modes: set[str] = set()  # the modules whose mode is kept: containers have no forward
        self.read = self._read_tensors()

    def text(self) -> str:
        """The whole file."""
        forward = self._forward()
        for name, child in _children(self.root):
            value = self._module(name, child, " " * 8)
            plain = _is_plain(name)
            self.lines.append(
                f"self.{name} = {value}" if plain else f"self.add_module({literal(name)}, {value})"
            )
        self._add_tensors()
        self._add_flags()
        body = "".join(f"        {line}\n" for line in self.lines)
        code = "\n\nclass Subnet(nn.Module):\n    def __init__(self) -> None:\n"
        code += f"        super().__init__()\n{body}\n{forward}"
        code += _LOAD.replace("    return model\n", f"{self._layout()}    return model\n")
        if re.search(r"\bGroup\(", code):
            code = _GROUP + code
        title = re.sub(r"\W", "", self.root._get_name())
        return f'"""{title}, {MARK}; `load()` gives it with its weights."""\n{_imports(code)}{code}'

    def _read_tensors(self) -> dict[str, list[str]]:
        """The tensors that the graph reads and that are neither parameter nor buffer."""
        found: dict[str, list[str]] = {}
        for target in dict.fromkeys(n.target for n in self.graph.nodes if n.op == "get_attr"):
            path, _, name = str(target).rpartition(".")
            owner = self.root.get_submodule(path)
            value = getattr(owner, name)
            if not isinstance(value, Tensor | nn.Module):
                raise ExportError(
                    f"the graph reads {target}: a {type(value).__name__} is no tensor"
                )
            if isinstance(value, Tensor) and name not in {**owner._parameters, **owner._buffers}:
                found.setdefault(path, []).append(name)
        return found

    def is_plain_tensor(self, path: str) -> bool:
        """Whether a tensor is neither parameter nor buffer of the subnet, but an attribute."""
        owner, _, name = path.rpartition(".")
        return name in self.read.get(owner, ())

    @functools.cached_property
    def _kinds(self) -> dict[int, str]:
        return {id(module): self._kind(path, module) for path, module in self.root.named_modules()}

    def _kind(self, path: str, module: nn.Module) -> str:
        """How a module is written: by its constructor, or as which container."""
        names = [name for name, _ in _children(module)]
        numbered = names == [str(i) for i in range(len(names))]
        if type(module) is nn.Sequential and id(module) in self.called and numbered:
            return "nn.Sequential"
        ours = getattr(nn, type(module).__name__, None) is type(module)
        if id(module) in self.called or (ours and type(module) not in _CONTAINERS):
            return "constructor"
        if module._parameters or module._buffers or path in self.read:
            return "Group"
        if numbered and names:
            return "nn.ModuleList"
        taken = set(dir(nn.Module)) | {"training"}
        if all(_is_plain(name) for name in names) and not taken & set(names):
            return "Group"
        return "Group" if set(dir(nn.ModuleDict)) & set(names) else "nn.ModuleDict"

    def _module(self, path: str, module: nn.Module, indent: str) -> str:
        """The expression that makes a module; one of several paths becomes a local variable."""
        if id(module) in self.locals:
            return self.locals[id(module)]
        if id(module) not in self.shared:
            return self._new_module(path, module, indent)
        name = "shared_" + re.sub(r"\W", "_", path)
        while name in self.locals.values():
            name += "_"
        value = self._new_module(path, module, " " * 8)
        self.lines.append(f"{name} = {value}")
        self.locals[id(module)] = name
        return name

    def _new_module(self, path: str, module: nn.Module, indent: str) -> str:
        kind = self._kinds[id(module)]
        if kind == "constructor":
            self.made.update(id(m) for m in module.modules())
            return constructor(path, module)
        deeper = indent + "    "
        children = {n: self._module(join(path, n), m, deeper) for n, m in _children(module)}
        if not children:
            return f"{kind}()"
        if kind in ("nn.ModuleList", "nn.Sequential"):
            items = [f"{value}," for value in children.values()]
        elif kind == "Group" and all(map(_is_plain, children)):
            items = [f"{name}={value}," for name, value in children.items()]
        else:
            items = [f"{literal(name)}: {value}," for name, value in children.items()]
        start, end = {"nn.ModuleList": ("[", "]"), "nn.ModuleDict": ("{", "}")}.get(kind, ("", ""))
        if kind == "Group" and not all(map(_is_plain, children)):
            start, end = "**{", "}"
        lines = "".join(f"{deeper}{item}\n" for item in items)
        return f"{kind}({start}\n{lines}{indent}{end})"

    def _at(self, path: str) -> str:
        """The expression of a module or tensor."""
        text, module = "self", self.root
        for name in path.split(".") if path else ():
            kind = "" if module is self.root else self._kinds[id(module)]
            if kind in ("nn.ModuleList", "nn.Sequential"):
                text += f"[{name}]"
            elif kind == "nn.ModuleDict":
                text += f"[{literal(name)}]"
            else:
                text = f"{text}.{name}" if _is_plain(name) else f"getattr({text}, {literal(name)})"
            child = module._modules.get(name)
            module = module if child is None else child
        return text

    def _add_tensors(self) -> None:
        """Register what no constructor makes, and tie what is one tensor under two paths."""
        first: dict[int, str] = {}
        for path, module in self.root.named_modules():
            owner = self._at(path)
            plain = {name: getattr(module, name) for name in self.read.get(path, ())}
            for name, tensor in {**module._parameters, **module._buffers, **plain}.items():
                if tensor is None:
                    continue
                tied = first.get(id(tensor))
                first.setdefault(id(tensor), join(path, name))
                if tied is None:
                    self.tensors[join(path, name)] = tensor
                if id(module) in self.made:
                    if tied is not None:
                        self.lines.append(f"{owner}.{name} = {self._at(tied)}")
                    continue
                value = _zeros(tensor) if tied is None else self._at(tied)
                if name in module._parameters:
                    plainly = f"{owner}.{name} = {value}"
                    called = f"{owner}.register_parameter({literal(name)}, {value})"
                    self.lines.append(plainly if _is_plain(name) else called)
                    continue
                hidden = name in plain or name in module._non_persistent_buffers_set
                more = ", persistent=False" if hidden else ""
                self.lines.append(f"{owner}.register_buffer({literal(name)}, {value}{more})")

    def _add_flags(self) -> None:
        """Freeze what is frozen, and put in the other mode what is in it."""
        named = self.root.named_parameters(remove_duplicate=False)
        for path in _highest({name: not p.requires_grad for name, p in named}):
            self.lines.append(f"{self._at(path)}.requires_grad_(False)")
        mode = self.root.training
        if not mode:
            self.lines.append("self.eval()")
        made = [(p, m) for p, m in self.root.named_modules(remove_duplicate=False) if p]
        other = {path: m.training != mode for path, m in made if id(m) in self.made}
        self.modes = {"", *other}
        for path in _highest({"": False} | other):
            self.lines.append(f"{self._at(path)}.{'eval' if mode else 'train'}()")

    def _layout(self) -> str:
        names = [name for name, t in self.tensors.items() if _is_channels_last(t)]
        if not names:
            return ""
        items = "".join(f"        {literal(name)},\n" for name in names)
        return _LAYOUT.format(items=items)

    def _forward(self) -> str:
        names: dict[fx.Node, str] = {}
        signature, lines = ["self"], []
        for node in self.graph.find_nodes(op="placeholder"):
            names[node] = str(node.target).lstrip("*")
        taken = {*_GLOBALS, *names.values()}
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "output"):
                name = node.name
                while name in taken:
                    name += "_"
                taken.add(name)
                names[node] = name
        for node in self.graph.nodes:
            try:
                if node.op == "placeholder":
                    default = f"={literal(node.args[0])}" if node.args else ""
                    signature.append(f"{node.target}{default}")
                else:
                    lines.append(self._statement(node, names))
            except ExportError as error:
                site = provenance(node).site
                place = f" ({site})" if site else ""
                raise ExportError(f"node {node.name}{place}: {error}") from error
        body = "".join(f"        {line}\n" for line in lines)
        return f"    def forward({', '.join(signature)}):\n{body}"

    def _statement(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        if node.op == "output":
            return f"return {literal(node.args[0], names)}"
        value = self._value(node, names)
        return f"{names[node]} = {value}" if node.users else value

    def _value(self, node: fx.Node, names: Mapping[fx.Node, str]) -> str:
        args = [literal(arg, names) for arg in node.args]
        target = node.target
        if node.op == "get_attr":
            return self._at(str(target))
        keywords = [f"{name}={literal(arg, names)}" for name, arg in node.kwargs.items()]
        given = ", ".join(args + keywords)
        if node.op == "call_module":
            return f"{self._at(str(target))}({given})"
        if node.op == "call_method":
            return f"{args[0]}.{target}({', '.join(args[1:] + keywords)})"
        assert callable(target)
        if not node.kwargs:
            name = getattr(target, "__name__", "")
            operands = [f"({text})" if text.startswith("-") else text for text in args]
            if target is getattr and len(args) == 2 and _is_plain(str(node.args[1])):
                return f"{operands[0]}.{node.args[1]}"
            if target is operator.getitem:
                return f"{operands[0]}[{subscript(node.args[1], names)}]"
            if getattr(operator, name, None) is target and name in magic_methods:
                return magic_methods[name].format(*operands)
        called = function_name(target)
        if called.partition(".")[0] in {names[n] for n in self.graph.find_nodes(op="placeholder")}:
            raise ExportError(f"an argument of the graph hides {called}: rename the argument")
        return f"{called}({given})"


def _run_by(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    if type(module) is nn.Sequential:
        for child in module:
            yield from _run_by(child)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _zeros(tensor: Tensor) -> str:
    dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    text = f"torch.zeros({', '.join(map(str, tensor.shape)) or '()'}{dtype})"
    if not isinstance(tensor, nn.Parameter):
        return text
    learns = tensor.is_floating_point() or tensor.is_complex()
    return f"nn.Parameter({text})" if learns else f"nn.Parameter({text}, requires_grad=False)"


def _is_channels_last(tensor: Tensor) -> bool:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return last and not tensor.is_contiguous()


def _imports(code: str) -> str:
    lines = [f"import {name}" for name in ("math", "operator") if f"{name}." in code]
    lines += ["from pathlib import Path", "", "import torch"]
    if re.search(r"\bF\.", code):
        lines.append("import torch.nn.functional as F")
    if "torchvision." in code:
        lines.append("import torchvision")
    return "\n".join(
        ["", *lines, "from safetensors.torch import load_file", "from torch import nn\n"]
    )
