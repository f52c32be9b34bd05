from typing import Any

import pytest
import torch
from torch import nn

from nasfx.errors import ExportError
from nasfx.export.constructors import constructor, literal, subscript


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.Conv2d(3, 8, 3, 2, bias=False), "nn.Conv2d(3, 8, kernel_size=3, stride=2, bias=False)"),
        (
            nn.Conv2d(8, 8, (1, 7), padding=(0, 3), padding_mode="circular"),
            'nn.Conv2d(8, 8, kernel_size=(1, 7), padding=(0, 3), padding_mode="circular")',
        ),
        (
            nn.ConvTranspose2d(4, 2, 3, 2, 1, 1),
            "nn.ConvTranspose2d(4, 2, kernel_size=3, stride=2, padding=1, output_padding=1)",
        ),
        (nn.MaxPool2d(2), "nn.MaxPool2d(2)"),
        (nn.MaxPool2d((3, 3), 1, 1), "nn.MaxPool2d((3, 3), stride=1, padding=1)"),
        (nn.BatchNorm2d(4, affine=False), "nn.BatchNorm2d(4, affine=False)"),
        (nn.BatchNorm1d(4, momentum=None), "nn.BatchNorm1d(4, momentum=None)"),
        (
            nn.BatchNorm1d(4, track_running_stats=False),
            "nn.BatchNorm1d(4, track_running_stats=False)",
        ),
        (nn.GroupNorm(2, 4, affine=False), "nn.GroupNorm(2, 4, affine=False)"),
        (nn.LayerNorm(8), "nn.LayerNorm(8)"),
        (nn.LayerNorm((8, 8), bias=False), "nn.LayerNorm((8, 8), bias=False)"),
        (
            nn.LayerNorm(8, elementwise_affine=False),
            "nn.LayerNorm(8, elementwise_affine=False)",
        ),
        (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            'nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True)',
        ),
        (
            nn.MultiheadAttention(8, 2, bias=False, kdim=4, batch_first=True),
            "nn.MultiheadAttention(8, 2, bias=False, kdim=4, batch_first=True)",
        ),
        (
            nn.LSTM(4, 8, 2, bias=False, bidirectional=True),
            "nn.LSTM(4, 8, num_layers=2, bias=False, bidirectional=True)",
        ),
        (nn.RNN(4, 8, nonlinearity="relu"), 'nn.RNN(4, 8, nonlinearity="relu")'),
        (nn.GRUCell(4, 8), "nn.GRUCell(4, 8)"),
        (nn.Embedding(5, 3, padding_idx=-1), "nn.Embedding(5, 3, padding_idx=4)"),
        (
            nn.TransformerEncoderLayer(8, 2, 16, activation="gelu"),
            "nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, activation=F.gelu)",
        ),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), None),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), None),
        (nn.PairwiseDistance(1.0), "nn.PairwiseDistance(p=1.0)"),
        (nn.ReflectionPad2d(1), "nn.ReflectionPad2d(1)"),
        (nn.Threshold(0.1, 20), "nn.Threshold(0.1, 20)"),
        (nn.Hardtanh(0.0, 6.0), "nn.Hardtanh(min_val=0.0, max_val=6.0)"),
        (nn.Softmax(dim=-1), "nn.Softmax(dim=-1)"),
        (nn.Identity(), "nn.Identity()"),
        (nn.Unflatten(1, (2, 4)), "nn.Unflatten(1, (2, 4))"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_constructors_show_what_is_not_the_default(module: nn.Module, text: str | None) -> None:
    got = constructor("m", module)  # compares what the text makes with the module
    assert text is None or got == text


def edited(change: str) -> nn.Module:
    module: Any = nn.MultiheadAttention(8, 2)
    if change == "another child":
        module.out_proj = nn.Linear(8, 8)
    elif change == "another shape":
        module.in_proj_weight = nn.Parameter(torch.zeros(24, 7))
    elif change == "a method":
        module.forward = lambda x: x
    elif change == "an attribute":
        module.head_dim = 2
    else:
        module.out_proj.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("another child", "m .*out_proj: its class is Linear"),
        ("another shape", "its tensors are"),
        ("a method", "its own 'forward' hides"),
        ("an attribute", "its head_dim is 2, not 4"),
        ("a hook", "module m.out_proj .* has hooks"),
    ],
)
def test_a_module_that_its_constructor_does_not_make_is_refused(change: str, words: str) -> None:
    with pytest.raises(ExportError, match=words):
        constructor("m", edited(change))


def test_literals_and_subscripts() -> None:
    values = [1, True, None, -0.5, "a'b", 'a"b\n', (1,), [(), {}], {"a": [1.0]}, 2 - 1j]
    for value in values:
        assert eval(literal(value)) == value
    assert literal(torch.float16) == "torch.float16"
    assert literal(torch.device("cpu")) == 'torch.device("cpu")'
    assert literal(torch.channels_last) == "torch.channels_last"
    assert literal(slice(1, None)) == "slice(1, None, None)"
    assert subscript((slice(None), 0, Ellipsis, slice(0, -1, 2)), {}) == ":, 0, ..., 0:-1:2"
    assert subscript((slice(None),), {}) == ":,"
    assert subscript((), {}) == "()"
    assert literal(torch.ops.aten.relu.default) == "torch.ops.aten.relu.default"
    with pytest.raises(ExportError, match="cannot be written"):
        literal(torch.zeros(1))
