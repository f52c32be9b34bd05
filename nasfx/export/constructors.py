"""Values, functions and torch.nn modules as the Python text that makes them again."""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import _get_qualified_name

from nasfx.errors import ExportError

_PLACES = (
    ("", builtins),
    ("operator.", operator),
    ("math.", math),
    ("F.", F),
    ("torch.", torch),
    ("torch.Tensor.", torch.Tensor),
    ("nn.", nn),
)

# Namespaces of torch.ops that exist wherever torch (and torchvision) is imported.
_OPS = ("aten", "prims", "prim", "torchvision")

# Classes whose __init__ spreads one number into a tuple, so that (3, 3) can be written 3.
_SPREAD = ("torch.nn.modules.conv", "torch.nn.modules.padding")

# Their constructors are `(*args, **kwargs)`; the names are those of RNNBase.
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)

_LAYER: dict[str, Callable[[Any], Any]] = {
    "d_model": lambda m: m.self_attn.embed_dim,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}

# Constructor arguments that are not kept in an attribute of the same name.
_READ: dict[str, dict[str, Callable[[Any], Any]]] = {
    "MultiheadAttention": {
        "bias": lambda m: m.in_proj_bias is not None,
        "add_bias_kv": lambda m: m.bias_k is not None,
        "kdim": lambda m: None if m.kdim == m.embed_dim else m.kdim,
        "vdim": lambda m: None if m.vdim == m.embed_dim else m.vdim,
    },
    "TransformerEncoderLayer": _LAYER,
    "TransformerDecoderLayer": _LAYER,
    "TransformerEncoder": {"encoder_layer": lambda m: m.layers[0]},
    "TransformerDecoder": {"decoder_layer": lambda m: m.layers[0]},
    "PairwiseDistance": {"p": lambda m: m.norm},
    "FrozenBatchNorm2d": {"num_features": lambda m: m.weight.numel()},
}

_NO_NAMES: Mapping[fx.Node, str] = {}


def literal(value: Any, names: Mapping[fx.Node, str] = _NO_NAMES) -> str:
    """The text of a value; nodes within it are written as `names` calls them.

    Raises:
        ExportError: the value is of a kind that cannot be written.
    """
    write = functools.partial(literal, names=names)
    if isinstance(value, fx.Node):
        return names[value]
    if value is Ellipsis:
        return "..."
    if value is None or type(value) in (bool, int):
        return repr(value)
    if type(value) is str:
        plain = value.isprintable() and not set(value) & {'"', "\\"}
        return f'"{value}"' if plain else repr(value)
    if type(value) is float:
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if type(value) is complex:
        return f"complex({write(value.real)}, {write(value.imag)})"
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, torch.Size):
        return f"torch.Size({write(list(value))})"
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return f"({write(value[0])},)" if len(value) == 1 else f"({', '.join(map(write, value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(write, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write(k)}: {write(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice | range):
        parts = [write(value.start), write(value.stop), write(value.step)]
        return f"{type(value).__name__}({', '.join(parts)})"
    if callable(value):
        return function_name(value)
    raise ExportError(f"a value of type {type(value).__qualname__} cannot be written as source")


def subscript(index: object, names: Mapping[fx.Node, str]) -> str:
    """The text between the brackets of `x[...]`, with slices as colons."""

    def one(part: object) -> str:
        if not isinstance(part, slice):
            return literal(part, names)
        start, stop, step = (
            "" if bound is None else literal(bound, names)
            for bound in (part.start, part.stop, part.step)
        )
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"

    if isinstance(index, tuple) and index:
        text = ", ".join(one(part) for part in index)
        return text if len(index) > 1 else f"{text},"
    return one(index)


def function_name(function: Callable[..., Any]) -> str:
    """How the written file names a function or type of Python, torch or torchvision.ops.

    Raises:
        ExportError: it is none of theirs, so the file would need something else to be importable.
    """
    name = getattr(function, "__name__", "")
    for prefix, place in (*_PLACES, *_torchvision_ops()):
        if name and getattr(place, name, None) is function:
            return prefix + name
    module = str(getattr(function, "__module__", None) or "")
    if module.partition(".")[0] == "torch":
        full = _get_qualified_name(function)
        parts = full.split(".")
        home = sys.modules["torch"]
        found = functools.reduce(lambda at, part: getattr(at, part, None), parts[1:], home)
        ours = parts[:2] != ["torch", "ops"] or parts[2] in _OPS
        if found is function and ours:
            return full
    hint = "finalize the supernet first" if module.partition(".")[0] == "nasfx" else "trace it"
    raise ExportError(
        f"{module}.{getattr(function, '__qualname__', name or repr(function))} cannot be written: "
        "source may only use functions of torch, torchvision.ops, operator, math and builtins; "
        f"{hint}, or pickle the subnet with torch.save(subnet, ...)"
    )


def _torchvision_ops() -> tuple[tuple[str, types.ModuleType], ...]:
    ops = sys.modules.get("torchvision.ops")
    return () if ops is None else (("torchvision.ops.", ops),)


def constructor(path: str, module: nn.Module) -> str:
    """The call that makes a module like `module` again, with its non-default arguments.

    The text is evaluated, and what it makes is compared with `module`: types, repr, shapes of
    parameters and buffers, and public attributes, at every depth.

    Args:
        path: where the module stands, for messages.
        module: a module of torch.nn or torchvision.ops.

    Raises:
        ExportError: it is of another class, carries hooks, or cannot be made by its constructor.

    Example:
        >>> constructor("stem", nn.Conv2d(16, 32, 3, padding=1, bias=False))
        'nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False)'
    """
    hooked = [name for name, m in module.named_modules() if _has_hooks(m)]
    if hooked:
        place = ".".join(filter(None, (path, hooked[0])))
        raise ExportError(
            f"module {place} ({type(module).__name__}) has hooks, which source cannot hold: "
            "remove them, or pickle the subnet with torch.save(subnet, ...)"
        )
    text = _call(path, module)
    if (difference := _difference(module, text)) is not None:
        raise ExportError(
            f"module {path} ({type(module).__name__}) cannot be written as {text}: {difference}; "
            "build it by its constructor alone, or pickle the subnet with torch.save(subnet, ...)"
        )
    return text


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    return any(getattr(module, f"_{kind}_hooks", None) for kind in kinds)


def _class_name(path: str, module: nn.Module) -> str:
    cls = type(module)
    for prefix, place in (("nn.", nn), *_torchvision_ops()):
        if getattr(place, cls.__name__, None) is cls:
            return prefix + cls.__name__
    raise ExportError(
        f"module {path} is a {cls.__module__}.{cls.__qualname__}: source can only be written for "
        "torch.nn modules (and those of torchvision.ops). Make it traceable (and not one of "
        "leaf_modules), so that its torch.nn modules stand in the graph, or pickle the subnet with "
        "torch.save(subnet, ...)"
    )


def _call(path: str, module: nn.Module) -> str:
    name = _class_name(path, module)
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    if isinstance(module, _RECURRENT):
        parameters = list(inspect.signature(nn.RNNBase.__init__).parameters.values())[2:]
    if isinstance(module, nn.RNN):
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter("nonlinearity", kind, default="tanh"))
    positional: list[str] = []
    keyword: list[str] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in ("device", "dtype") or parameter.name.startswith("_"):
            continue
        value = _argument(path, module, parameter)
        if value is not parameter.empty and not _equal(value, parameter.default):
            text = _value_text(path, value)
            if parameter.default is parameter.empty and not keyword and len(positional) < 2:
                positional.append(text)
            else:
                keyword.append(f"{parameter.name}={text}")
    return f"{name}({', '.join(positional + keyword)})"


def _argument(path: str, module: nn.Module, parameter: inspect.Parameter) -> Any:
    """The value to give for a parameter; `parameter.empty` to leave it out."""
    name = parameter.name
    if read := _READ.get(type(module).__name__, {}).get(name):
        return read(module)
    if not hasattr(module, name):
        if parameter.default is not parameter.empty:
            return parameter.empty
        raise ExportError(
            f"module {path} ({type(module).__name__}) does not keep its constructor's argument "
            f"{name!r}, so it cannot be written as source; pickle the subnet with torch.save"
        )
    value = getattr(module, name)
    if name == "bias" and not isinstance(value, bool):
        # A norm without affine parameters has no bias either, whatever it was given.
        learns = getattr(module, "affine", True) and getattr(module, "elementwise_affine", True)
        return value is not None if learns else parameter.empty
    if name == "stride" and value == getattr(module, "kernel_size", None) and not parameter.default:
        return parameter.empty  # pooling: no stride means the kernel's size
    if not isinstance(value, tuple) or len(set(value)) != 1:
        return value
    spread = type(module).__module__ in _SPREAD or (name == "normalized_shape" and len(value) == 1)
    return value[0] if spread else value


def _value_text(path: str, value: Any) -> str:
    if isinstance(value, nn.Module):
        return _call(path, value)
    if isinstance(value, torch.Tensor):  # a loss's weight: a buffer, which is loaded
        return f"torch.zeros({literal(tuple(value.shape))})"
    return literal(value)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return a is b or bool(isinstance(a, bool) == isinstance(b, bool) and a == b)


def _difference(module: nn.Module, text: str) -> str | None:
    """How what `text` makes differs from `module`; None if it does not."""
    names = {"nn": nn, "F": F, "torch": torch, "torchvision": sys.modules.get("torchvision")}
    names |= {"operator": operator, "math": math}
    try:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            made = eval(text, names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    ours = dict(module.named_modules(remove_duplicate=False))
    theirs = dict(made.named_modules(remove_duplicate=False))
    if list(ours) != list(theirs):
        return f"its modules are {list(ours)}, not {list(theirs)}"
    for name, mine in ours.items():
        if (difference := _own_difference(mine, theirs[name])) is not None:
            return f"{name}: {difference}" if name else difference
    return None


def _own_difference(mine: nn.Module, other: nn.Module) -> str | None:
    if type(mine) is not type(other):
        return f"its class is {type(mine).__qualname__}, not {type(other).__qualname__}"
    if mine.extra_repr() != other.extra_repr():
        return f"it is ({mine.extra_repr()}), not ({other.extra_repr()})"
    if _shapes(mine) != _shapes(other):
        return f"its tensors are {_shapes(mine)}, not {_shapes(other)}"
    attributes = vars(other)
    for name, value in vars(mine).items():
        if name.startswith("_") or name == "training":
            continue
        if name not in attributes and hasattr(type(mine), name):
            return f"its own {name!r} hides that of {type(mine).__name__}"
        if name in attributes and not _equal(value, attributes[name]):
            return f"its {name} is {value!r}, not {attributes[name]!r}"
    missing = [name for name in attributes if not name.startswith("_") and name not in vars(mine)]
    return f"it has no {missing[0]!r}" if missing else None


def _shapes(module: nn.Module) -> dict[str, Any]:
    hidden = module._non_persistent_buffers_set
    tensors = [("parameter", module._parameters), ("buffer", module._buffers)]
    return {
        name: tensor if tensor is None else (kind, tuple(tensor.shape), name in hidden)
        for kind, entries in tensors
        for name, tensor in entries.items()
    }
