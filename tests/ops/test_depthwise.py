import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasfx.ops import depthwise_conv

SETTINGS = [
    # kernel, stride, padding, dilation
    (3, 1, 1, 1), (5, 1, 2, 1), (7, 1, 3, 1), (4, 1, 2, 1), (5, 1, 0, 1), (5, 1, 6, 1),
    (3, 2, 1, 1), (5, 2, 2, 1), (7, 3, 3, 1), (7, 2, 3, 1), (7, 9, 3, 1), (5, 12, 5, 1),
    (3, 1, 2, 2), (5, 1, 4, 2), (5, 1, 3, 2), (5, 1, 0, 2), (3, 1, 3, 3),
    (3, 2, 2, 2), (5, 2, 4, 2), (5, 2, 3, 2), (3, 2, 4, 4), (3, 3, 3, 3),
]  # fmt: skip
"""Dense, strided and dilated kernels; paddings that keep the size and others."""


def gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[int, ...], ours: bool
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    inputs = (*leaves, None)[:3]
    y = depthwise_conv(*inputs, *settings) if ours else F.conv2d(*inputs, *settings, x.shape[1])
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    first = torch.autograd.grad((y * cotangent).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves[:2])
    return [y, *first, *second]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    "size",
    [(12, 12), (13, 12), (1, 1), (2, 2), (4, 7), (7, 3)],
    ids=["even", "odd", "one", "two", "low", "narrow"],
)
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
def test_it_is_conv2d_with_both_derivatives(
    settings: tuple[int, ...], size: tuple[int, int], last: bool
) -> None:
    k, stride, padding, dilation = settings
    rest = stride, padding, dilation
    if min(size) + 2 * padding < dilation * (k - 1) + 1:
        pytest.skip("the image is smaller than the kernel")
    torch.manual_seed(0)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight, bias = torch.randn(4, 1, k, k, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    for b in (None, bias):
        pairs = zip(
            *(gradients(x, weight, b, tuple(rest), ours) for ours in (True, False)), strict=True
        )
        for found, expected in pairs:
            assert found.shape == expected.shape
            assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("settings", SETTINGS)
def test_single_precision_runs_other_kernels(settings: tuple[int, ...]) -> None:
    k, *rest = settings
    torch.manual_seed(0)
    x = torch.randn(2, 16, 12, 12).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(16, 1, k, k)
    pairs = zip(
        *(gradients(x, weight, None, tuple(rest), ours) for ours in (True, False)), strict=True
    )
    for found, expected in pairs:
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 5, 5)
    for wanted in (x, weight):
        wanted.requires_grad_()
        depthwise_conv(x, weight, None, 1, 2).sum().backward()
        assert wanted.grad is not None
        wanted.requires_grad_(False)
        wanted.grad = None
    assert not depthwise_conv(x, weight, None, 1, 2).requires_grad


def test_autocast_and_other_devices_take_torchs_own() -> None:
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv(x, weight, None, 1, 2)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert depthwise_conv(x.to("meta"), weight.to("meta"), None, 2, 2).shape == (2, 4, 4, 4)
