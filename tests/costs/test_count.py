import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from nasfx.costs.count import Count, count
from nasfx.errors import NasfxError


@pytest.mark.parametrize(
    ("module", "shape", "macs"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 6, 5), 6 * 5 * 9 * 3 * 8),
        (nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6), 4 * 4 * 9 * 2 * 8),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (8, 6, 6), 6 * 6 * 9 * 8),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 7, 9), 4 * 5 * 9 * 3 * 8),
        (nn.Conv2d(3, 8, 3, dilation=2), (3, 9, 9), 5 * 5 * 9 * 3 * 8),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), (3, 4, 4), 4 * 4 * 4 * 3 * 8),
        (nn.Linear(6, 4), (6,), 24),
        (nn.Linear(6, 4, bias=False), (5, 6), 5 * 24),
        (nn.LSTM(4, 8, batch_first=True), (5, 4), 5 * 4 * 8 * (4 + 8)),
        (nn.GRU(4, 8, batch_first=True), (5, 4), 5 * 3 * 8 * (4 + 8)),
        (nn.BatchNorm2d(3), (3, 4, 4), 0),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), (3, 4, 4), 0),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_equal_the_formula_at_any_batch_size(
    module: nn.Module, shape: tuple[int, ...], macs: int, batch: int
) -> None:
    if isinstance(module, nn.TransformerEncoderLayer):
        projections, attention, feed_forward = 5 * 4 * 8 * 8, 2 * 5 * 5 * 8, 2 * 5 * 8 * 16
        macs = projections + attention + feed_forward
    counted = count(module, torch.randn(batch, *shape))
    assert counted.flops == macs
    assert counted == count(module, torch.randn(1, *shape))


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(x, y), self.v)


def test_products_of_activations_and_with_vectors_are_counted() -> None:
    inputs = (torch.randn(2, 3, 5), torch.randn(2, 5, 4))
    assert count(Products(), inputs).flops == 3 * 5 * 4 + 3 * 4


def test_two_inputs_and_bilinear() -> None:
    assert count(nn.Bilinear(3, 4, 5), (torch.randn(2, 3), torch.randn(2, 4))).flops == 60


def test_attention_counts_its_products_despite_fused_kernels() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    fast = torch.backends.mha.get_fastpath_enabled()
    assert count(Attention(), torch.randn(2, 2, 5, 4)).flops == 2 * (2 * 5 * 5 * 4)
    assert torch.backends.mha.get_fastpath_enabled() == fast


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6, bias=False)
        self.b = nn.Linear(6, 6)
        self.b.weight = self.a.weight
        self.a.weight.requires_grad_(False)
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(torch.relu(self.a(x))))


def test_shared_parameters_count_once_and_their_calls_each_time() -> None:
    counted = count(Tied(), torch.randn(1, 6))
    assert counted.params == 36 + 6
    assert counted.flops == 3 * 36


def test_activation_bytes_by_leaf_module_or_by_call_node() -> None:
    model = Tied()
    x = torch.randn(4, 6)
    # Three linear outputs of six floats; the traced graph also sees the relu.
    assert count(model, x).activation_bytes == 3 * 6 * 4
    assert count(fx.symbolic_trace(model), x).activation_bytes == 4 * 6 * 4
    assert count(copy.deepcopy(model).double(), x.double()).activation_bytes == 3 * 6 * 8


class Split(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return a.size(1) * torch.cat([b, a], 1)


def test_a_call_that_returns_several_tensors_counts_each_once() -> None:
    # Two halves, their concatenation, the product; neither the tuple nor the size.
    assert count(fx.symbolic_trace(Split()), torch.randn(2, 8)).activation_bytes == (8 + 8 + 8) * 4


def test_the_module_the_inputs_and_the_random_state_stay_as_they_are() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.drop(self.norm(x.add_(1))) + torch.rand_like(x)

    model = Noisy()
    model.drop.eval()
    x = torch.randn(4, 3)
    before, kept = copy.deepcopy(model.state_dict()), x.clone()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    state = torch.get_rng_state()
    count(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_hooks for m in model.modules())
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_resnet18_is_the_published_count() -> None:
    models = pytest.importorskip("torchvision.models")
    counted = count(models.resnet18(), torch.randn(1, 3, 224, 224))
    assert (counted.flops, counted.params) == (1_814_073_344, 11_689_512)


def test_str_says_macs() -> None:
    assert str(Count(1200, 3, 4)) == "1,200 MACs, 3 parameters, 4 activation bytes per sample"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (torch.randn(2, 5), r"Linear does not run on example_inputs \(float32\[2, 5\]\)"),
        (torch.tensor(1.0), "has no batch"),
        (torch.zeros(0, 6), "has no batch"),
        ((3,), "has no batch"),
        ([torch.zeros(1, 6)], "not a list"),
    ],
)
def test_bad_inputs_are_named(inputs: Tensor, words: str) -> None:
    with pytest.raises(NasfxError, match=words):
        count(nn.Linear(6, 6), inputs)


def test_work_done_once_per_batch_is_an_error() -> None:
    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.a @ self.b)

    assert count(Once(), torch.randn(1, 3)).flops == 9 + 27
    with pytest.raises(NasfxError, match="batch size one"):
        count(Once(), torch.randn(2, 3))
