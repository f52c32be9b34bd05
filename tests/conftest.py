import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)

hypothesis.settings.register_profile(
    "nasfx",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("nasfx")

_DICTIONARIES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_non_persistent_buffers_set",
)


def digest(tensor: Tensor) -> tuple[Any, ...]:
    """All that is seen of a tensor: which object, its type and every byte of it."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return (
        id(tensor),
        tensor.dtype,
        tuple(tensor.shape),
        tensor.requires_grad,
        None if tensor.grad is None else digest(tensor.grad),
        hashlib.blake2b(flat.numpy().tobytes()).hexdigest(),
    )


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What must stay as it is in a user's model: objects, bytes, flags, hooks, attributes."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path} module"] = id(module), type(module), module.training
        found[f"{path} attributes"] = list(module.__dict__)
        for name in _DICTIONARIES:
            own = module.__dict__[name]
            members = [(k, id(v)) for k, v in own.items()] if isinstance(own, dict) else sorted(own)
            found[f"{path} {name}"] = id(own), members
        tensors = {**module._parameters, **module._buffers, **module.__dict__}
        for key, value in tensors.items():
            if isinstance(value, Tensor):
                found[f"{path} tensor {key}"] = digest(value)
            elif isinstance(value, list | set | str | int | float | tuple | bool | None):
                found[f"{path} value {key}"] = id(value), repr(value)
    return found


@pytest.fixture
def untouched() -> Iterator[Callable[[nn.Module], nn.Module]]:
    """Call it with a model; after the test the model must be exactly what it was then."""
    watched: list[tuple[nn.Module, dict[str, Any]]] = []

    def watch(model: nn.Module) -> nn.Module:
        watched.append((model, fingerprint(model)))
        return model

    yield watch
    for model, before in watched:
        after = fingerprint(model)
        changed = [k for k in before.keys() | after.keys() if before.get(k) != after.get(k)]
        assert not changed, f"{type(model).__name__} was changed: {sorted(changed)}"
