import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasfx.ops import average_pool

SETTINGS = [(3, 1), (3, 0), (2, 1), (2, 0), (5, 2), (5, 1), (1, 0)]  # kernel, padding


@pytest.mark.parametrize(("kernel", "padding"), SETTINGS)
@pytest.mark.parametrize("counts", [True, False], ids=["padding-counts", "it-does-not"])
@pytest.mark.parametrize("size", [(8, 8), (7, 5), (5, 5), (1, 2)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["rows", "channels-last"])
def test_it_is_avg_pool2d_with_both_derivatives(
    kernel: int, padding: int, counts: bool, size: tuple[int, int], last: bool
) -> None:
    if min(size) + 2 * padding < kernel:
        pytest.skip("the image is smaller than the window")
    torch.manual_seed(0)
    image = torch.randn(2, 4, *size, dtype=torch.float64)
    image = image.contiguous(memory_format=torch.channels_last) if last else image
    found, expected = (values(image, ours, kernel, padding, counts) for ours in (True, False))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-13 * b.norm()


def values(image: Tensor, ours: bool, kernel: int, padding: int, counts: bool) -> list[Tensor]:
    x = image.clone().requires_grad_()
    if ours:
        y = average_pool(x, kernel, padding, counts)
    else:
        y = F.avg_pool2d(x, kernel, 1, padding, False, counts)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    (first,) = torch.autograd.grad((y**2 * weight).sum(), x, create_graph=True)
    return [y, first, *torch.autograd.grad((first**2).sum(), x)]


def test_elsewhere_it_is_torchs_own() -> None:
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(average_pool(x, 3, 1, False), F.avg_pool2d(x, 3, 1, 1, False, False))
    assert average_pool(x.to("meta"), 3, 1).shape == x.shape
    assert torch.equal(average_pool(x[0], 3, 1), F.avg_pool2d(x[0], 3, 1, 1))
    with pytest.raises(RuntimeError, match="pad should be at most half"):
        average_pool(x, 3, 2)
