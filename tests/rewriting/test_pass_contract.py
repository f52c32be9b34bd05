import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from expecttest import assert_expected_inline
from nasfx.passes import Canonicalize, LowerWeightedSum, RemoveDeadCode
from torch import Tensor, fx, nn

import nasfx
from nasfx import LayerChoice, PassError, SpaceError, VerifyError
from nasfx.ops import CHOICE, SUBNET, SUPERNET
from nasfx.rewriting.graph import ModelGraph, copy_graph_module, provenance
from nasfx.rewriting.passes import Exactness, Pass, PassContext
from nasfx.rewriting.pipeline import Pipeline
from nasfx.rewriting.verifier import ANY, Stage


@dataclass(frozen=True)
class Calling(Pass):
    """Runs a function as a pass."""

    code: Callable[[fx.GraphModule, PassContext], Any]
    factor: int = 1

    name: ClassVar[str] = "calling"
    consumes: ClassVar[Stage] = ANY
    produces: ClassVar[Stage] = ANY
    exactness: ClassVar[Exactness] = Exactness.APPROXIMATE


def _run(self: Calling, gm: fx.GraphModule, ctx: PassContext) -> Any:
    return self.code(gm, ctx)


Calling.run = _run  # type: ignore[assignment]
Calling.__abstractmethods__ = frozenset()


def calling(code: Callable[..., Any], **options: Any) -> Calling:
    return Calling(code, **options)


def model() -> nn.Module:
    return nn.Sequential(
        LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act"), nn.Identity()
    )


def graph_of(net: nn.Module) -> ModelGraph:
    return copy_graph_module(nasfx.trace(net).graph_module)


# -- the contract of one pass ----------------------------------------------------------------------


@pytest.mark.parametrize("result", [None, 1, "changed"])
def test_run_must_return_a_bool(result: Any) -> None:
    with pytest.raises(PassError, match=f"must return True or False, not {result!r}"):
        calling(lambda gm, ctx: result)(graph_of(model()), PassContext())


def test_an_exception_is_wrapped_with_the_name_of_the_pass() -> None:
    def fails(gm: Any, ctx: Any) -> bool:
        raise KeyError("conv3")

    with pytest.raises(PassError, match="pass calling failed: KeyError: 'conv3'") as caught:
        calling(fails)(graph_of(model()), PassContext())
    assert isinstance(caught.value.__cause__, KeyError)
    assert "a mistake in the pass, not in the model" in str(caught.value)


def test_errors_of_nasfx_pass_through_with_the_name_of_the_pass_as_a_note() -> None:
    error = SpaceError("the user's mistake")

    def refuses(gm: Any, ctx: Any) -> bool:
        raise error

    with pytest.raises(SpaceError) as caught:
        calling(refuses)(graph_of(model()), PassContext())
    assert caught.value is error
    assert error.__notes__ == ["while running pass calling"]


def _break(gm: fx.GraphModule, ctx: PassContext) -> bool:
    list(gm.graph.nodes)[1].target = "9"
    return True


def test_the_result_is_verified_unless_asked_not_to() -> None:
    with pytest.raises(VerifyError, match=r"after calling: node %_0 breaks .*there is no module 9"):
        calling(_break)(graph_of(model()), PassContext())
    assert calling(_break)(graph_of(model()), PassContext(), check=False).modified is True


def test_a_change_is_compiled_and_new_nodes_know_their_pass() -> None:
    gm = graph_of(nn.Sequential(nn.ReLU()))
    x = torch.tensor([-1.0, 2.0])
    assert gm(x).tolist() == [0, 2]

    def negate(gm: fx.GraphModule, ctx: PassContext) -> bool:
        output = gm.graph.output_node()
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(torch.neg, output.args),)
        return True

    result = calling(negate)(gm, PassContext())
    assert result.graph_module is gm
    assert gm(x).tolist() == [0, -2]
    made_by = {node.name: provenance(node).made_by for node in gm.graph.nodes}
    assert made_by == {"input_1": "", "_0": "", "neg": "calling", "output": ""}


def test_new_nodes_know_their_pass_also_where_they_take_the_memory_of_erased_ones() -> None:
    gm = graph_of(nn.Sequential(*(nn.ReLU() for _ in range(300))))

    def swap(gm: fx.GraphModule, ctx: PassContext) -> bool:
        values = gm.graph.find_nodes(op="call_module")
        source = next(iter(gm.graph.nodes))
        output = gm.graph.output_node()
        output.args = (source,)
        for node in reversed(values):
            gm.graph.erase_node(node)
        del values, node
        with gm.graph.inserting_before(output):
            for _ in range(300):
                source = gm.graph.call_function(torch.relu, (source,))
        output.args = (source,)
        return True

    calling(swap)(gm, PassContext())
    made = [provenance(n).made_by for n in gm.graph.nodes if n.op == "call_function"]
    assert made == ["calling"] * 300


# -- pipelines -------------------------------------------------------------------------------------


def to(consumes: Stage, produces: Stage, name: str = "to") -> Pass:
    class To(Calling):
        pass

    To.name, To.consumes, To.produces = name, consumes, produces  # type: ignore[misc]
    return To(lambda gm, ctx: False)


def test_stages_must_fit_together() -> None:
    pipeline = Pipeline((to(SUPERNET, SUPERNET), to(CHOICE, CHOICE, "late")))
    with pytest.raises(
        PassError, match="pass late takes a graph in stage CHOICE, but here it is in stage SUPERNET"
    ):
        pipeline.run(graph_of(nn.ReLU()), PassContext())


def test_the_graph_that_a_pipeline_starts_with_is_verified() -> None:
    with pytest.raises(VerifyError, match=r"after trace: .* choice 0 must have been lowered"):
        Pipeline((to(SUPERNET, SUPERNET),)).run(graph_of(model()), PassContext())


@pytest.mark.parametrize("passes", [(), (Canonicalize(),)])
def test_a_pipeline_of_passes_for_any_stage_runs_or_says_why_not(passes: tuple[Pass, ...]) -> None:
    try:
        history = Pipeline(passes).run(graph_of(nn.ReLU()), PassContext())
    except PassError:
        return
    assert len(history) == len(passes) + 1


def names(pipeline: Pipeline) -> list[str]:
    return [p.name for p in pipeline.passes]


def test_an_extra_pass_runs_after_the_last_one_of_its_stage() -> None:
    base = Pipeline((Canonicalize(), LowerWeightedSum(), RemoveDeadCode()))
    extra = [to(CHOICE, CHOICE, "c1"), to(SUPERNET, SUPERNET, "s"), to(ANY, ANY, "a"),
             to(CHOICE, CHOICE, "c2")]  # fmt: skip
    assert names(base.with_passes(extra)) == [
        "canonicalize", "c1", "c2", "lower-weighted-sum", "remove-dead-code", "s", "a",
    ]  # fmt: skip
    assert names(base) == ["canonicalize", "lower-weighted-sum", "remove-dead-code"]


@pytest.mark.parametrize("wrong", [Canonicalize, "canonicalize", lambda gm, ctx: True])
def test_what_is_no_pass_instance_is_refused(wrong: Any) -> None:
    with pytest.raises(PassError, match="is no pass: hand over an instance"):
        Pipeline((LowerWeightedSum(),)).with_passes([wrong])


@pytest.mark.parametrize(
    "stages", [(SUBNET, SUBNET), (CHOICE, SUPERNET), (CHOICE, ANY), (ANY, CHOICE)]
)
def test_a_pass_without_a_place_is_refused(stages: tuple[Stage, Stage]) -> None:
    with pytest.raises(
        PassError, match=r"pass to goes from \w+ to \w+; .* room for passes within CHOICE, SUPERNET"
    ):
        Pipeline((LowerWeightedSum(),)).with_passes([to(*stages)])


# -- history ---------------------------------------------------------------------------------------


def net_with(*extra: Pass) -> nasfx.Supernet:
    return nasfx.transform(model(), "darts", extra_passes=extra, optimize="off")


def test_history_shows_what_every_pass_did() -> None:
    def declines(gm: fx.GraphModule, ctx: PassContext) -> bool:
        ctx.skip(list(gm.graph.nodes)[1], "it is the first")
        return False

    history = net_with(calling(declines, factor=3)).history
    shown = re.sub(r" +\d+\.\d ms", " T ms", str(history))
    shown = re.sub(r"code=.*, factor", "code=..., factor", shown)
    shown = "\n".join(line.rstrip() for line in shown.split("\n"))
    assert_expected_inline(
        shown,
        """\
  0  trace                        CHOICE T ms
  1  canonicalize                 CHOICE T ms  +1 -2 lines, bitwise
  2  infer-shapes                 CHOICE T ms  nothing to do
  3  functionalize-inplace        CHOICE T ms  nothing to do
  4  lower-weighted-sum           SUPERNET T ms  +5 -3 lines, lowers
  5  remove-dead-code             SUPERNET T ms  nothing to do
  6  calling(code=..., factor=3) SUPERNET T ms  nothing to do
       skipped %arch_act: it is the first""",
    )
    assert len(history) == len(history.records) == 7
    assert [s.reason for s in history.records[-1].skips] == ["it is the first"]
    assert all(not r.skips for r in history.records[:-1])
    history = net_with(calling(declines), calling(lambda gm, ctx: False)).history
    assert [len(r.skips) for r in history.records[-2:]] == [1, 0], "skips belong to their own pass"


def test_text_and_diff() -> None:
    history = net_with().history
    lowering = next(i for i, r in enumerate(history.records) if r.name.startswith("lower"))
    assert history.text(lowering - 1) == history.text(1) != history.text(0)
    assert history.text() == history.text(-1) == str(net_with().graph)
    assert_expected_inline(
        history.diff(lowering - 1, lowering),
        """\
--- functionalize-inplace
+++ lower-weighted-sum
@@ -1,5 +1,7 @@
 %input_1 = placeholder[input]
-%_0 = call_module[0](%input_1)
-    relu: ReLU
-    tanh: Tanh
+%arch_act = get_attr[arch.act]
+%gate_act = nasfx.ops.softmax_gate(%arch_act, label='act')
+%_0_relu = call_module[0.relu](%input_1)
+%_0_tanh = call_module[0.tanh](%input_1)
+%_0 = nasfx.ops.mix(%gate_act, [%_0_relu, %_0_tanh], label='act')
 return %_0""",
    )
    assert history.diff(0, 0) == ""


def test_lines_know_their_label() -> None:
    history = net_with().history
    labels = {line.text.strip().split(" ")[0]: line.label for line in history.lines(-1)}
    assert labels["%_0"] == labels["%gate_act"] == labels["%_0_relu"] == "act"
    assert labels["%input_1"] == ""


@pytest.mark.parametrize("label", ["with\ttab", "with\nnewline", "with 'quotes\""])
def test_strange_labels(label: str) -> None:
    try:
        net = nasfx.transform(
            nn.Sequential(LayerChoice({"a": nn.ReLU(), "b": nn.Tanh()}, label=label)), "darts"
        )
    except SpaceError:
        return  # refused is as good
    str(net.history)
    assert net.history.text() == str(net.graph)
    nasfx.explain(net, label)


def test_explain_shows_one_choice_through_the_passes() -> None:
    shown = nasfx.explain(net_with(), "act").replace(__file__, "test.py")
    assert_expected_inline(
        re.sub(r":\d+", ":N", shown),
        """\
choice 'act': relu, tanh
  at 0

as traced:
  %_0 = call_module[0](%input_1)
      relu: ReLU
      tanh: Tanh

after lower-weighted-sum:
  %arch_act = get_attr[arch.act]
  %gate_act = nasfx.ops.softmax_gate(%arch_act, label='act')
  %_0_relu = call_module[0.relu](%input_1)
  %_0_tanh = call_module[0.tanh](%input_1)
  %_0 = nasfx.ops.mix(%gate_act, [%_0_relu, %_0_tanh], label='act')""",
    )
    with pytest.raises(SpaceError, match=r"no choice has the label 'bct'.*\['act'\]"):
        nasfx.explain(net_with(), "bct")


class Modal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = LayerChoice({"relu": nn.ReLU(), "tanh": nn.Tanh()}, label="act")

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * 2 if self.training else self.act(x)


def test_nasfx_dump_writes_the_graph_after_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new" / "folder"
    monkeypatch.setenv("NASFX_DUMP", str(folder))
    net = net_with(calling(lambda gm, ctx: False, factor=2))
    files = sorted(p.name for p in folder.iterdir())
    assert files == [
        "00-trace.txt", "01-canonicalize.txt", "02-infer-shapes.txt",
        "03-functionalize-inplace.txt", "04-lower-weighted-sum.txt",
        "05-remove-dead-code.txt", "06-calling.txt",
    ]  # fmt: skip
    for i, name in enumerate(files):
        assert (folder / name).read_text() == net.history.text(i) + "\n"


def test_nasfx_dump_keeps_the_modes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NASFX_DUMP", str(tmp_path))
    net = nasfx.transform(Modal(), "darts")
    assert set(net.histories) == {"train", "eval"}
    assert (tmp_path / "train-00-trace.txt").read_text() != (
        tmp_path / "eval-00-trace.txt"
    ).read_text()


def test_without_the_variable_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NASFX_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    net_with()
    assert not list(tmp_path.iterdir())


def test_verify_off_checks_nothing() -> None:
    nasfx.transform(model(), "darts", extra_passes=[calling(_break)], verify="off")
    with pytest.raises(VerifyError):
        nasfx.transform(model(), "darts", extra_passes=[calling(_break)])
