from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nasfx import SearchError
from nasfx.ops import mix
from nasfx.ops.mix import add_mixed

A, B, C = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
GATE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
SUM = 0.2 * A + 0.3 * B + 0.5 * C


def test_tensors() -> None:
    torch.testing.assert_close(mix(GATE, [A, B, C]), SUM, rtol=1e-14, atol=1e-14)


def test_gradients() -> None:
    inputs = [t.clone().requires_grad_() for t in (GATE, A, B, C)]
    assert torch.autograd.gradcheck(lambda g, *outputs: mix(g, list(outputs)), inputs)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: (t, t * 2),
        lambda t: [t],
        lambda t: {"y": t, "z": (t, [t])},
        lambda t: (t, None),
        lambda t: (t, "name", 3),
    ],
    ids=["tuple", "list", "dict", "none", "constants"],
)
def test_structures_are_mixed_item_by_item(wrap: Any) -> None:
    found, spec = pytree.tree_flatten(mix(GATE, [wrap(A), wrap(B), wrap(C)]))
    expected, wanted = pytree.tree_flatten(wrap(SUM))
    assert spec == wanted
    for ours, theirs in zip(found, expected, strict=True):
        if isinstance(theirs, Tensor):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
        else:
            assert ours == theirs


def test_the_gate_is_cast_to_the_outputs() -> None:
    assert mix(GATE, [A.float(), B.float(), C.float()]).dtype == torch.float32
    assert mix(GATE.float(), [A, B, C]).dtype == torch.float64


def test_dictionaries_are_mixed_by_key() -> None:
    first, second = {"a": A, "b": B}, {"b": C, "a": A}
    try:
        found = mix(GATE[:2], [first, second])
    except SearchError:
        return  # refused is as good
    torch.testing.assert_close(found["a"], 0.2 * A + 0.3 * A)
    torch.testing.assert_close(found["b"], 0.2 * B + 0.3 * C)


@pytest.mark.parametrize(
    "outputs",
    [
        [A, A[:1], A],
        [A, A, A.unsqueeze(0)],
        [A, (A,), A],
        [(A, A), (A, B[:1]), (A, A)],
        [(A,), (A, A), (A,)],
        [{"y": A}, {"z": A}, {"y": A}],
        [(A, A), (A, None), (A, A)],
        [(A, None), (A, A), (A, None)],
        [(A, 3), (A, 5), (A, 3)],
    ],
    ids=[
        "shape", "rank", "tensor and tuple", "shape inside", "length", "keys", "missing",
        "missing first", "constants",
    ],
)  # fmt: skip
def test_unlike_outputs_are_an_error_that_names_the_choice(outputs: list[Any]) -> None:
    with pytest.raises(SearchError, match="choice 'block'"):
        mix(GATE, outputs, label="block")


def test_integer_outputs_are_not_silently_zero() -> None:
    """0/1 weights cast to integers are zeros: whatever is done, it must not be that."""
    ones = torch.ones(3, dtype=torch.int64)
    try:
        found = mix(torch.tensor([0.5, 0.5]), [2 * ones, 4 * ones], label="block")
    except SearchError:
        return
    assert found.tolist() == [3, 3, 3]


def test_the_message_lists_the_shapes_and_says_what_to_do() -> None:
    with pytest.raises(SearchError) as caught:
        mix(GATE, [A, A, A[:1]], label="block")
    assert "candidate 2 differs: (2, 3), (2, 3), (1, 3)" in str(caught.value)
    assert "samples one path" in str(caught.value)


def test_a_mixture_is_added_in_place_with_both_derivatives() -> None:
    torch.manual_seed(0)
    gate, a, b, start = (
        torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)
    )
    gate = gate.detach()[0].requires_grad_()

    def added(gate: Tensor, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        total = start * 2
        result = add_mixed(total, gate, [a, 0, b])
        assert result.data_ptr() == total.data_ptr()
        return result

    expected = 2 * start + gate[0] * a + gate[2] * b
    assert torch.allclose(added(gate, a, b, start), expected, rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(added, (gate, a, b, start))
    assert torch.autograd.gradgradcheck(added, (gate, a, b, start))
    half = add_mixed(start.float() * 2, gate, [a, 0, b])  # of unlike dtypes: that of the total
    assert half.dtype == torch.float32
    assert torch.allclose(half, expected.float())
