"""`transform(optimize=...)`: what runs by default, and that a net stays a net with it."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from nasfx.passes import (
    CountBatchesOnce,
    DropZeroCandidates,
    FoldGatesIntoNorms,
    RemoveDeadCode,
    ShareSubexpressions,
)
from torch import Tensor, fx, nn

import nasfx
from nasfx import Supernet
from nasfx.errors import PassError, SearchError
from nasfx.spaces import darts, nasbench201, proxyless, shufflenet
from nasfx.spaces.blocks import dilated_conv, separable_conv
from nasfx.transforming import SAMPLED_PATH, WEIGHTED_SUM
from tests.models import CHANNELS, Block, DartsNet, Zero
from tests.passes.proof import assert_near, assert_same, cells, pool_bn, run, transformed

NAMES = [
    "drop-zero-candidates", "fold-linear-candidates", "share-subexpressions", "share-norms",
    "fold-gates-into-norms(own_gain=True)", "propagate-channels-last", "cheapen-depthwise",
    "cheapen-pools",
]  # fmt: skip


EVERY = (*WEIGHTED_SUM, FoldGatesIntoNorms(), CountBatchesOnce())


def images(channels: int = 3, size: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, size, size, dtype=torch.float64, generator=generator)


def operations() -> dict[str, nn.Module]:
    """Those of a DARTS edge for which there is a rule."""
    return {
        "none": Zero(),
        "max": pool_bn(nn.MaxPool2d),
        "skip": nn.Identity(),
        "sep5": separable_conv(CHANNELS, 5, affine=False),
        "dil3": dilated_conv(CHANNELS, 3, affine=False),
    }


def cell() -> nn.Module:
    torch.manual_seed(0)
    return DartsNet(["normal"], 2, operations).double()


def optimisations(net: Supernet) -> list[str]:
    return [r.name for r in net.history.records if r.name in NAMES]


@pytest.mark.parametrize("strategy", ["darts", "fbnet"])
def test_weighted_sums_are_optimised_by_default_and_it_is_recorded(strategy: str) -> None:
    net = nasfx.transform(Block(), strategy)
    assert optimisations(net) == NAMES
    assert all(r.exactness == "reassociates" for r in net.history.records if r.name in NAMES)
    assert str(nasfx.transform(Block(), strategy).graph) == str(net.graph)


@pytest.mark.parametrize("strategy", ["single-path", "proxyless", "enas", "random"])
def test_sampled_nets_get_what_serves_a_single_path(strategy: str) -> None:
    names = ["propagate-channels-last", "cheapen-depthwise", "cheapen-pools"]
    assert optimisations(nasfx.transform(Block(), strategy)) == names
    assert optimisations(nasfx.transform(Block(), strategy, optimize="off")) == []


def test_off_and_a_list() -> None:
    assert optimisations(nasfx.transform(Block(), "darts", optimize="off")) == []
    chosen = [ShareSubexpressions(), DropZeroCandidates()]
    net = nasfx.transform(Block(), "darts", optimize=chosen, extra_passes=[RemoveDeadCode()])
    assert [r.name for r in net.history.records][-3:] == [
        *(p.name for p in chosen),
        "remove-dead-code",
    ]


def test_other_values_are_refused() -> None:
    with pytest.raises(SearchError, match="optimize='on' must be 'auto', 'off', or a list"):
        nasfx.transform(Block(), "darts", optimize="on")
    wrong: Any = [ShareSubexpressions]
    with pytest.raises(PassError, match="is no pass"):
        nasfx.transform(Block(), "darts", optimize=wrong)


@settings(max_examples=40)
@given(cells())
def test_all_together_on_random_supernets(model: nn.Module) -> None:
    assert_same(model, EVERY)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["darts", nasfx.Darts(inputs="softmax"), "fbnet"])
def test_the_darts_space(strategy: Any) -> None:
    torch.manual_seed(0)
    x = images(size=16)  # maps of 2 pixels make batch norms ill-conditioned
    assert_same(darts.cifar(channels=4, cells=3).double(), EVERY, x, strategy)


@pytest.mark.parametrize("strategy", ["darts", "fbnet"])
def test_nas_bench_201(strategy: str) -> None:
    torch.manual_seed(0)
    assert_same(nasbench201.net(channels=4, cells=1).double(), EVERY, images(size=16), strategy)


@pytest.mark.parametrize("strategy", ["single-path", "proxyless", nasfx.Proxyless(gate="two")])
def test_sampled_paths_of_the_mobile_space(strategy: Any) -> None:
    torch.manual_seed(0)
    model, x = narrow_proxyless(), images(size=64)
    net = assert_same(model, SAMPLED_PATH, x, strategy)
    assert str(net.graph).count("nasfx.ops.depthwise_conv") == 84


def spos() -> nn.Module:
    model = shufflenet.spos(classes=5).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # two nets would draw different numbers
    return model


def narrow_proxyless() -> nn.Module:
    return proxyless.mobile(stem=8, widths=(4, 4, 8, 8, 8, 12, 12), head=16, classes=5).double()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["darts", "single-path"])
@pytest.mark.parametrize("make", [spos, narrow_proxyless])
def test_the_spaces_of_mobile_nets(make: Callable[[], nn.Module], strategy: str) -> None:
    torch.manual_seed(0)
    passes = EVERY if strategy == "darts" else SAMPLED_PATH
    x = torch.randn(8, 3, 64, 64, dtype=torch.float64)  # batch norms of two are ill-conditioned
    assert_same(make(), passes, x, strategy)


IMAGES = images(CHANNELS, 6)


# -- a net stays a net -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def net() -> Supernet:
    made = nasfx.transform(cell(), "darts", example_inputs=IMAGES, copy=True, optimize=EVERY)
    made(IMAGES)  # running statistics that are not those of the start
    return made


def assert_equal_runs(first: Supernet, second: Supernet) -> None:
    for training in (False, True):
        results = [run(n.train(training), IMAGES) for n in (first, second)]
        for found, expected in zip(*results, strict=True):
            assert_near(found, expected, "copy")


def test_copies(net: Supernet) -> None:
    start = copy.deepcopy(net)
    for made in (copy.deepcopy(start), _pickled(start)):
        assert str(made.graph) == str(start.graph)
        first = copy.deepcopy(start)
        assert_equal_runs(first, made)
        shared = {p.data_ptr() for p in start.parameters()} & {
            p.data_ptr() for p in made.parameters()
        }
        assert not shared


def _pickled(net: Supernet) -> Supernet:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_state_dicts_have_the_same_keys_and_load_both_ways(net: Supernet) -> None:
    plain = nasfx.transform(cell(), "darts", optimize="off")
    assert list(plain.state_dict()) == list(net.state_dict())
    plain.load_state_dict(net.state_dict())
    assert_equal_runs(copy.deepcopy(net), plain)
    other = nasfx.transform(cell(), "darts", optimize=EVERY, seed=3)
    other.load_state_dict(plain.state_dict())
    assert_equal_runs(other, plain)


def test_a_model_whose_shared_statistics_differ_is_evaluated_with_its_own(net: Supernet) -> None:
    ours = copy.deepcopy(net)
    for name, buffer in ours.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    plain = nasfx.transform(cell(), "darts", optimize="off")
    plain.load_state_dict(ours.state_dict())
    assert_near(*({"y": n.eval()(IMAGES).detach()} for n in (ours, plain)), "eval")  # type: ignore[arg-type]


def test_one_architecture(net: Supernet) -> None:
    ours = copy.deepcopy(net).eval()
    for seed in range(3):
        arch = ours.space.sample(torch.Generator().manual_seed(seed))
        subnet = nasfx.finalize(ours, arch)
        certificate = subnet.certificate
        assert certificate["structure"] == certificate["tensors"] == "passed"
        assert certificate["outputs"] == "passed"
        assert certificate["supernet_difference"] < 1e-12
        assert "share-norms: reassociates" in certificate["supernet_exactness"]
        assert not any("nasfx" in str(node) for node in subnet.graph.nodes)
        expected = subnet(IMAGES)
        with ours.forced(arch):
            assert torch.equal(ours(IMAGES), expected)
        torch.testing.assert_close(ours.run_one_hot(arch, IMAGES), expected, rtol=1e-11, atol=1e-12)


def test_the_user_s_tensors_stay_where_they_are_and_as_they_lie(untouched: Any) -> None:
    model = untouched(cell())
    net = nasfx.transform(model, "darts")
    own = dict(model.named_parameters())
    for name, p in net.named_parameters():
        if not name.startswith("arch."):
            assert p is own[name]
            assert p.is_contiguous()


def test_steps_and_precisions(net: Supernet) -> None:
    ours = copy.deepcopy(net).float().train()
    x = IMAGES.float()
    before = str(ours.graph)
    with ours.arch_step():
        ours.objective(ours(x).square().mean()).backward()
    assert all(p.grad is None for p in ours.weight_parameters())
    assert all(p.grad is not None for p in ours.arch_parameters())
    ours.zero_grad()
    with torch.autocast("cpu", torch.bfloat16), ours.weight_step():
        ours(x).float().square().mean().backward()
    assert all(p.grad is not None for p in ours.weight_parameters())
    assert all(p.grad is None for p in ours.arch_parameters())
    assert str(ours.graph) == before


def test_unrolled_steps() -> None:
    found: list[dict[str, Tensor]] = []
    for optimize in (EVERY, "off"):
        made = transformed(cell(), optimize, nasfx.Darts(unrolled="exact"))
        optimizer = torch.optim.SGD(made.weight_parameters(), 0.01)

        def inner(made: Supernet = made) -> Tensor:
            return made(IMAGES).square().mean()

        with made.arch_step(inner=inner, weight_optimizer=optimizer):
            made.objective(made(IMAGES + 1).square().mean()).backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    ours, plain = found
    assert ours.keys() == plain.keys()
    for name, grad in plain.items():
        assert (ours[name] - grad).norm() <= 1e-9 * grad.norm(), name


def test_a_foreign_trace_keeps_the_functions() -> None:
    net = transformed(cell(), EVERY)
    again = fx.symbolic_trace(net.graph_module)
    names = [str(getattr(n.target, "__name__", n.target)) for n in again.graph.nodes]
    assert {"mix_norms", "shared_norms", "depthwise_conv", "channels_last"} <= set(names)
    torch.testing.assert_close(again(IMAGES), net(IMAGES), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimize", [WEIGHTED_SUM, EVERY], ids=["auto", "every"])
def test_it_compiles_as_one_graph(optimize: Any) -> None:
    plain, ours = (transformed(cell(), o) for o in ("off", optimize))
    outputs = [n(IMAGES) for n in (plain, torch.compile(ours, backend="eager", fullgraph=True))]
    for y in outputs:
        y.square().sum().backward()
    found, expected = (
        {name: p.grad for name, p in n.named_parameters() if p.grad is not None}
        for n in (ours, plain)
    )
    assert_near({"y": outputs[1].detach()}, {"y": outputs[0].detach()}, "compiled")
    assert_near(found, expected, "compiled gradient")
    assert_near(dict(ours.named_buffers()), dict(plain.named_buffers()), "compiled buffer")
