"""A subnet as readable Python source beside its weights, which needs torch and nothing of nasfx."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import fx

from nasfx.errors import ExportError
from nasfx.export.rendering import MARK, Source

MODULE, WEIGHTS, ARCHITECTURE = "subnet.py", "weights.safetensors", "architecture.json"


_PROBE = """
import importlib.util
sys.modules["nasfx"] = None
sys.path.append(sys.argv[2])
spec = importlib.util.spec_from_file_location("subnet", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.stdout.write("\\n" + json.dumps(_facts(module.load())))
"""


def write_module(subnet: fx.GraphModule, folder: str | Path) -> Path:
    """Write a graph module as Python source that runs with torch and safetensors alone.

    The folder then holds `subnet.py` (a class `Subnet`, whose `__init__` makes the modules under
    their own paths and whose `forward` is the graph, a line per node, and a function `load()`),
    `weights.safetensors` (parameters and buffers, also those that are not in the state_dict) and,
    if the subnet has an `architecture`, `architecture.json`. What is tied stays tied; dtypes,
    `requires_grad`, and the mode of the whole and of each module are those of the subnet. Tensors
    that are different objects over the same memory become independent.

    The file is loaded in a fresh process where nasfx cannot be imported, and every tensor is
    compared bit for bit. The graph's outputs are not compared: that needs inputs.

    Args:
        subnet: the graph module; it may only call modules of torch.nn and torchvision.ops, and
            functions of torch, torchvision.ops, operator, math and builtins.
        folder: where to write. A folder of ours is replaced; any other must be empty or absent.

    Returns:
        The path of `subnet.py`.

    Raises:
        ExportError: something has no source (the message names the module or node), the folder
            holds other things, or the written network differs. The folder is then as before.

    Example:
        >>> write_module(subnet, "exported")  # doctest: +SKIP
        PosixPath('exported/subnet.py')
        >>> from exported.subnet import load  # doctest: +SKIP
    """
    folder = Path(folder)
    _check_replaceable(folder)
    source = Source(subnet)
    text = source.text()
    target = folder.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        (new / MODULE).write_text(text, encoding="utf-8")
        values = {name: t.detach().cpu().contiguous() for name, t in source.tensors.items()}
        try:
            # Views of one memory are refused by safetensors: each is saved by itself.
            save_file({name: t.clone() for name, t in values.items()}, new / WEIGHTS)
            if (architecture := getattr(subnet, "architecture", None)) is not None:
                plain = dict(architecture) if isinstance(architecture, Mapping) else architecture
                (new / ARCHITECTURE).write_text(json.dumps(plain, indent=2) + "\n")
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise ExportError(f"the subnet cannot be saved in {folder}: {error}") from error
        _verify(subnet, source, new / MODULE)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError as error:
            if old.exists():
                old.rename(target)
            raise ExportError(f"{folder} cannot be written: {error}") from error
    return folder / MODULE


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ExportError(f"{folder} is a file; give a folder to write the subnet to")
    names = {path.name for path in folder.iterdir()} - {"__pycache__"}
    if not names:
        return
    module = folder / MODULE
    ours = module.is_file() and MARK in module.read_text(errors="replace").split("\n", 1)[0]
    if others := names - {MODULE, WEIGHTS, ARCHITECTURE} if ours else names:
        raise ExportError(
            f"{folder} holds {sorted(others)[0]!r}, which write_module did not write: "
            "give an empty or a new folder"
        )


def _facts(model: Any, more: Any = ()) -> dict[str, Any]:
    """What must be equal in the loaded file; it also runs there, so it imports what it needs."""
    import hashlib

    import torch

    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False), *more]
    first: dict[int, str] = {}
    tensors = {}
    for name, tensor in named:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        tensors[name] = [
            hashlib.sha256(flat.view(torch.uint8).numpy().tobytes()).hexdigest(),
            f"{tensor.dtype} {list(tensor.shape)}",
            isinstance(tensor, torch.nn.Parameter),
            tensor.requires_grad,
            first.setdefault(id(tensor), name),
        ]
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    return {"tensors": tensors, "modes": modes, "keys": list(model.state_dict())}


def _verify(subnet: fx.GraphModule, source: Source, path: Path) -> None:
    """Load the file in a process without nasfx and compare what it holds with the subnet."""
    script = f"from __future__ import annotations\nimport json, sys\n{inspect.getsource(_facts)}"
    home = str(Path(inspect.getfile(torch)).parents[1])
    command = [sys.executable, "-I", "-B", "-c", script + _PROBE, str(path), home]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        error = ExportError("the written source does not load; the subnet was not written")
        error.add_note(run.stderr)
        raise error
    plain = [(name, t) for name, t in source.tensors.items() if source.is_plain_tensor(name)]
    got, want = json.loads(run.stdout.rpartition("\n")[2]), _facts(subnet, plain)
    for key in ("tensors", "modes"):
        for name, fact in want[key].items():
            # Containers have no forward, and so no mode that matters.
            if key == "modes" and name and name not in source.modes:
                continue
            if got[key].get(name) != fact:
                raise ExportError(
                    f"{name or 'the subnet'} is {got[key].get(name)} in the written source, "
                    f"not {fact} ({key}); the subnet was not written"
                )
    if sorted(got["keys"]) != sorted(want["keys"]):
        keys = sorted(set(got["keys"]) ^ set(want["keys"]))
        raise ExportError(f"the written source has other state_dict keys: {', '.join(keys)}")
