"""The controller of ENAS against a re-computation from its parameters. float64 unless said."""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nasfx.choice import Decision
from nasfx.errors import SearchError
from nasfx.strategies.controller import Answer, Controller, Question

Decisions = dict[str, Decision]

OPS = ("conv", "pool", "skip")
MIXED = (
    Question("n/op0", OPS, 3, 1),
    Question("n/in1", None, 2, None, ("n/op0", None)),
    Question("n/op1", OPS, 3, 1),
    Question("r/in2", None, 4, 2, (None, None, "n/op0", "n/op1")),
    Question("r/in3", None, 3, 1, ("n/in1", "n/op1", "r/in2")),
    Question("r/act", ("relu", "tanh"), 2, 1),
    Question("r/in4", None, 3, None, ("n/op0", "n/op1", "r/in3")),
    Question("r/in5", None, 2, 2),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 5.0},
    "tanh": {"tanh_constant": 1.5},
    "macro": {"tanh_constant": 1.5, "temperature": 0.7, "skip_target": 0.3},
    "micro": {
        "tanh_constant": 1.1,
        "op_tanh_reduce": 2.5,
        "exact_entropy": True,
        "op_bias": {"conv": 10.0, "relu": 0.5},
        "fixed_bias": {"n/*": {"conv": 0.25, "pool": -0.25}, "*/op1": {"pool": 2.0}},
    },
    "exact entropy": {"exact_entropy": True},
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(
    questions: tuple[Question, ...] = MIXED, *, hidden: int = 5, seed: int = 0, **options: Any
) -> Controller:
    """A controller in float64 whose probabilities are far from equal."""
    options = {"dtype": torch.float64} | options
    controller = Controller(questions, hidden=hidden, generator=generator(seed), **options)
    source = generator(seed + 1)
    with torch.no_grad():
        for p in controller.parameters():
            p += 0.8 * torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.dtype)
    return controller


def possible(question: Question) -> list[Decision]:
    if question.names is not None:
        return list(question.names)
    sizes = range(question.n + 1) if question.n_chosen is None else (question.n_chosen,)
    return [s for size in sizes for s in itertools.combinations(range(question.n), size)]


def all_decisions(questions: tuple[Question, ...]) -> Iterator[Decisions]:
    for chosen in itertools.product(*(possible(q) for q in questions)):
        yield dict(zip((q.label for q in questions), chosen, strict=True))


def log_p(answer: Answer) -> float:
    return sum(answer.log_prob.values(), torch.zeros(())).item()


# -- the formulas, once more and straightforwardly -------------------------------------------------


class Expected(NamedTuple):
    log_prob: dict[str, float]
    entropy: float
    skip_penalty: float
    probabilities: dict[str, list[float]]


def lstm_step(state: dict[str, Tensor], x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    gates = state["lstm.weight_ih"] @ x + state["lstm.bias_ih"]
    gates = gates + state["lstm.weight_hh"] @ h + state["lstm.bias_hh"]
    i, f, g, o = gates.chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def recomputed(
    controller: Controller,
    decisions: Decisions,
    tables: dict[tuple[str, ...], str],
    *,
    temperature: float = 1.0,
    tanh_constant: float | None = None,
    op_tanh_reduce: float = 1.0,
    skip_target: float = 0.4,
    exact_entropy: bool = False,
    op_bias: Any = None,
    fixed_bias: Any = None,
) -> Expected:
    del op_bias  # is in the parameters
    state = {name: p.detach() for name, p in controller.named_parameters()}
    x = state["g_emb"]
    h = c = torch.zeros_like(x)
    outputs: dict[str, Tensor] = {}
    log_probs: dict[str, float] = {}
    probabilities: dict[str, list[float]] = {}
    entropy, penalties = 0.0, []
    for question in controller.questions:
        h, c = lstm_step(state, x, h, c)
        decision = decisions[question.label]
        if question.names is not None:
            key = tables[question.names]
            logits = (state[f"w_soft.{key}"] @ h + state[f"b_soft.{key}"]) / temperature
            if tanh_constant is not None:
                logits = tanh_constant / op_tanh_reduce * torch.tanh(logits)
            if fixed_bias:  # as written out for "micro": n/* and */op1
                add = {
                    "n/op0": [0.25, -0.25, 0.0],
                    "n/op1": [0.25, 1.75, 0.0],
                    "r/act": [0.0, 0.0],
                }
                logits = logits + torch.tensor(add[question.label], dtype=logits.dtype)
            p = (logits.exp() / logits.exp().sum()).tolist()
            index = question.names.index(str(decision))
            terms = [p[index]]
            spread = [p]
            probabilities[question.label] = p
            if f"embeddings.{key}" in state:
                x = state[f"embeddings.{key}"][index]
        else:
            assert isinstance(decision, tuple)
            sources = question.sources or (None,) * question.n
            anchors = [
                state["attention.anchors"][sources[:i].count(None)] if s is None else outputs[s]
                for i, s in enumerate(sources)
            ]
            q = []
            for anchor in anchors:
                inner = state["attention.w_1"] @ anchor + state["attention.w_2"] @ h
                score = (state["attention.v"] * torch.tanh(inner)).sum() / temperature
                q.append(score if tanh_constant is None else tanh_constant * torch.tanh(score))
            values = [score.item() for score in q]
            chosen = [anchors[i] for i in decision]
            total = sum(chosen, torch.zeros_like(h))
            if question.n_chosen is None:
                yes = [math.exp(v) / (math.exp(v) + math.exp(-v)) for v in values]
                terms = [y if i in decision else 1 - y for i, y in enumerate(yes)]
                spread = [[y, 1 - y] for y in yes]
                probabilities[question.label] = yes
                kl = 0.0
                for v in values:
                    for logit, target in ((-v, 1 - skip_target), (v, skip_target)):
                        s = 1 / (1 + math.exp(-logit))
                        kl += s * math.log(s / target)
                penalties.append(kl)
                x = total / (1 + len(decision))
            else:
                subsets = list(itertools.combinations(range(question.n), question.n_chosen))
                weights = [math.exp(sum(values[i] for i in s)) for s in subsets]
                law = [w / sum(weights) for w in weights]
                terms = [law[subsets.index(decision)]]
                spread = [law] if question.n_chosen == 1 else [terms]
                probabilities[question.label] = [
                    sum(p for p, s in zip(law, subsets, strict=True) if i in s)
                    for i in range(question.n)
                ]
                x = total / question.n_chosen
        log_probs[question.label] = sum(math.log(t) for t in terms)
        if exact_entropy:
            entropy += sum(-p * math.log(p) for law in spread for p in law)
        else:
            entropy += sum(ce * math.exp(-ce) for ce in (-math.log(t) for t in terms))
        outputs[question.label] = h
    penalty = sum(penalties) / len(penalties) if penalties else 0.0
    return Expected(log_probs, entropy, penalty, probabilities)


TABLES: dict[tuple[str, ...], str] = {OPS: "0", ("relu", "tanh"): "1"}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("seed", range(3))
def test_formulas(options: dict[str, Any], seed: int) -> None:
    controller = built(seed=seed, **options)
    for draw in range(4):
        answer = controller(generator=generator(draw))
        expected = recomputed(controller, answer.decisions, TABLES, **options)
        labels = [q.label for q in MIXED]
        assert list(answer.decisions) == list(answer.log_prob) == labels
        assert list(answer.probabilities) == labels
        for label in labels:
            assert answer.log_prob[label].shape == ()
            assert answer.log_prob[label].item() == pytest.approx(
                expected.log_prob[label], rel=1e-10, abs=1e-12
            )
            assert answer.probabilities[label].tolist() == pytest.approx(
                expected.probabilities[label], rel=1e-10
            )
        assert answer.entropy.item() == pytest.approx(expected.entropy, rel=1e-10)
        assert answer.skip_penalty.item() == pytest.approx(expected.skip_penalty, rel=1e-10)
        assert answer.log_prob["r/in5"].item() == 0.0  # both of two


@pytest.mark.parametrize("exact", [False, True])
def test_numbers_for_equal_probabilities(exact: bool) -> None:
    controller = built(exact_entropy=exact)
    with torch.no_grad():
        for p in controller.parameters():
            p.zero_()
    answer = controller()
    first = {"n/op0": "conv", "n/op1": "conv", "r/act": "relu", "r/in2": (0, 1), "r/in3": (0,)}
    assert answer.decisions == first | {"n/in1": (0, 1), "r/in4": (0, 1, 2), "r/in5": (0, 1)}
    counts = {"n/op0": 3, "n/in1": 4, "n/op1": 3, "r/in2": 6, "r/in3": 3, "r/act": 2, "r/in4": 8}
    for label, count in (counts | {"r/in5": 1}).items():
        assert answer.log_prob[label].item() == pytest.approx(-math.log(count), abs=1e-12)
    three, six, two = math.log(3), math.log(6) / 6, math.log(2)
    one_of_three = three if exact else three / 3
    one_of_two = two if exact else two / 2
    entropy = 3 * one_of_three + 6 * one_of_two + six  # 5 bits and the two activations; 3 of three
    assert answer.entropy.item() == pytest.approx(entropy, abs=1e-12)
    bit = 0.5 * math.log(0.5 / 0.6) + 0.5 * math.log(0.5 / 0.4)
    assert answer.skip_penalty.item() == pytest.approx((2 * bit + 3 * bit) / 2, abs=1e-12)


def test_without_any_subset_there_is_no_penalty() -> None:
    answer = built(MIXED[:1])()
    assert answer.skip_penalty.item() == 0.0


def test_what_is_differentiable() -> None:
    answer = built()(generator=generator())
    assert not answer.entropy.requires_grad
    assert not any(p.requires_grad for p in answer.probabilities.values())
    assert answer.skip_penalty.requires_grad
    assert all(p.requires_grad for p in answer.log_prob.values())


# -- laws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["micro"]], ids=["plain", "micro"])
def test_probabilities_of_all_decisions_sum_to_one(options: dict[str, Any]) -> None:
    questions = MIXED[:5]
    options = options | {"op_bias": {}}
    controller = built(questions, **options)
    with torch.no_grad():
        values = [math.exp(log_p(controller(d))) for d in all_decisions(questions)]
    assert len(values) == 3 * 4 * 3 * 6 * 3
    assert math.fsum(values) == pytest.approx(1.0, abs=1e-12)
    assert max(values) > 3 * min(values)


def test_draws_follow_the_scored_probabilities() -> None:
    questions = (
        Question("in0", None, 2, None),
        Question("op", OPS, 3, 1),
        Question("in1", None, 3, 2, ("in0", "op", None)),
        Question("in2", None, 2, 1, ("op", "in1")),
    )
    controller = built(questions, hidden=4, seed=3, tanh_constant=1.5)
    draws, source = 4000, generator(7)
    with torch.no_grad():
        p = {str(d): math.exp(log_p(controller(d))) for d in all_decisions(questions)}
        counts = Counter(str(controller(generator=source).decisions) for _ in range(draws))
    assert set(counts) <= set(p)
    # Chi-square, with the rare decisions in one class, below its 0.999 quantile (Wilson, Hilferty).
    frequent = [d for d in p if draws * p[d] >= 5]
    pairs = [(draws * p[d], counts[d]) for d in frequent]
    rare = draws * (1 - math.fsum(p[d] for d in frequent))
    if rare >= 5:
        pairs.append((rare, draws - sum(counts[d] for d in frequent)))
    assert len(pairs) > 30
    chi2 = sum((n - e) ** 2 / e for e, n in pairs)
    freedom = len(pairs) - 1
    w = 2 / (9 * freedom)
    assert chi2 < freedom * (1 - w + 3.09 * math.sqrt(w)) ** 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_a_drawn_answer_gives_it_bit_by_bit(dtype: torch.dtype) -> None:
    controller = built(dtype=dtype, tanh_constant=2.5, temperature=5.0)
    for seed in range(10):
        drawn = controller(generator=generator(seed))
        scored = controller(drawn.decisions)
        assert scored.decisions == drawn.decisions
        for found, expected in ((scored, drawn), (controller(drawn.decisions, generator()), drawn)):
            for label in drawn.log_prob:
                assert torch.equal(found.log_prob[label], expected.log_prob[label])
                assert torch.equal(found.probabilities[label], expected.probabilities[label])
            assert torch.equal(found.entropy, expected.entropy)
            assert torch.equal(found.skip_penalty, expected.skip_penalty)
            assert found.entropy.dtype == dtype


def test_draws_read_the_generator_alone() -> None:
    controller = built(tanh_constant=1.0)
    before = torch.get_rng_state()
    runs = [
        [controller(generator=g).decisions for _ in range(5)] for g in map(generator, (1, 1, 2))
    ]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_do_not_depend_on_the_precision() -> None:
    single = built(dtype=torch.float32, tanh_constant=1.0)
    double = copy.deepcopy(single).to(torch.float64)
    g, k = generator(5), generator(5)
    draws = [(single(generator=g).decisions, double(generator=k).decisions) for _ in range(50)]
    assert all(a == b for a, b in draws)
    assert len({str(a) for a, _ in draws}) > 20


@pytest.mark.parametrize("seed", range(4))
def test_the_greedy_answer_is_the_most_probable_at_each_step(seed: int) -> None:
    controller = built(seed=seed)
    answer = controller()
    assert controller().decisions == answer.decisions
    for question in MIXED:
        best = max(
            possible(question),
            key=lambda d: (
                controller(answer.decisions | {question.label: d}).log_prob[question.label].item()
            ),
        )
        assert answer.decisions[question.label] == best


def test_inputs_may_come_in_any_order_and_in_a_list() -> None:
    controller = built()
    decisions = controller(generator=generator()).decisions | {"r/in2": (1, 3)}
    other: dict[str, Any] = {**decisions, "r/in2": [3, 1], "elsewhere": "conv"}
    assert controller(other).decisions == decisions
    assert log_p(controller(other)) == log_p(controller(decisions))


# -- parameters and gradients ----------------------------------------------------------------------


def test_every_parameter_gets_a_gradient() -> None:
    controller = built()
    gradients: dict[str, Tensor] = {}
    decisions = controller(generator=generator()).decisions
    sum(controller(decisions).log_prob.values(), torch.zeros(())).backward()
    for name, p in controller.named_parameters():
        assert p.grad is not None, name
        assert p.grad.count_nonzero(), name
        gradients[name] = p.grad
    # Not only somewhere: all of what every question reads moves.
    for name in ("g_emb", "attention.anchors", "attention.w_1", "attention.w_2", "attention.v"):
        assert gradients[name].count_nonzero() == gradients[name].numel(), name


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["macro"]], ids=["plain", "macro"])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    controller = built(hidden=2, **options)
    decisions = controller(generator=generator(3)).decisions
    names = [name for name, _ in controller.named_parameters()]

    def value(*parameters: Tensor) -> tuple[Tensor, Tensor]:
        values = dict(zip(names, parameters, strict=True))
        answer = torch.func.functional_call(controller, values, (decisions,))
        return sum(answer.log_prob.values(), torch.zeros(())), answer.skip_penalty

    assert torch.autograd.gradcheck(value, tuple(controller.parameters()))


def test_ascent_makes_a_decision_the_most_probable() -> None:
    controller = Controller(MIXED, hidden=8, generator=generator(), tanh_constant=2.5)
    # In r/in2 two inputs without a source are told apart.
    target = controller(generator=generator(4)).decisions | {"r/in2": (1, 3)}
    assert controller().decisions != target
    optimizer = torch.optim.Adam(controller.parameters(), lr=0.05)
    start = controller.g_emb.detach().clone()
    for _ in range(40):
        optimizer.zero_grad()
        (-sum(controller(target).log_prob.values(), torch.zeros(()))).backward()
        optimizer.step()
    assert controller().decisions == target
    assert (controller.g_emb != start).all()


def test_initial_values() -> None:
    before = torch.get_rng_state()
    controllers = [
        Controller(MIXED, generator=generator(seed), op_bias={"conv": 10.0, "tanh": -1.0})
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (dict(c.named_parameters()) for c in controllers)
    assert first["lstm.weight_ih"].shape == (256, 64)
    for name, p in first.items():
        assert p.dtype == torch.float32
        assert torch.equal(p, again[name])
        if name.startswith("b_soft"):
            continue
        assert not torch.equal(p, other[name])
        assert p.abs().max() <= 0.1
        if p.numel() >= 64:
            assert p.max() > 0.08
            assert p.min() < -0.08
    assert first["b_soft.0"].tolist() == [10.0, 0.0, 0.0]
    assert first["b_soft.1"].tolist() == [0.0, -1.0]
    assert all(p.requires_grad for p in first.values())
    double = Controller(MIXED, generator=generator(), dtype=torch.float64)
    for name, p in double.named_parameters():
        if not name.startswith("b_soft"):
            assert torch.equal(p.to(torch.float32), first[name])


def test_equal_names_share_their_parameters() -> None:
    ops = [Question(label, OPS, 3, 1) for label in "abc"]
    flipped = Question("d", OPS[::-1], 3, 1)
    controller = Controller((*ops, flipped), hidden=4, generator=generator())
    keys = {name.split(".")[0]: set[str]() for name in controller.state_dict()}
    for name in controller.state_dict():
        keys[name.split(".")[0]].add(name)
    assert keys["w_soft"] == {"w_soft.0", "w_soft.1"}
    assert keys["b_soft"] == {"b_soft.0", "b_soft.1"}
    assert keys["embeddings"] == {"embeddings.0"}  # after the last question nothing reads one
    with torch.no_grad():
        controller.b_soft["0"][1] = 50.0
    assert [controller().decisions[label] for label in "abc"] == ["pool"] * 3
    renamed = Controller((*ops[::-1], flipped), hidden=4, generator=generator())
    renamed.load_state_dict(controller.state_dict())
    values = {label: p.tolist() for label, p in controller().probabilities.items()}
    assert list(renamed().probabilities) == ["c", "b", "a", "d"]
    assert [p.tolist() for p in renamed().probabilities.values()] == list(values.values())


def test_nothing_is_created_that_no_question_reads() -> None:
    layers = Controller(MIXED[:1], hidden=4, generator=generator())
    assert not dict(layers.attention.named_parameters())
    assert not dict(layers.embeddings.named_parameters())
    sourced = Controller((MIXED[0], MIXED[2], Question(
        "in", None, 2, None, ("n/op0", "n/op1"))), hidden=4, generator=generator())  # fmt: skip
    assert set(dict(sourced.attention.named_parameters())) == {"w_1", "w_2", "v"}


def test_state_goes_through_a_state_dict_and_a_copy() -> None:
    controller = built(**OPTIONS["micro"])
    fresh = Controller(
        MIXED, hidden=5, generator=generator(9), dtype=torch.float64, **OPTIONS["micro"]
    )
    decisions = controller(generator=generator()).decisions
    assert log_p(fresh(decisions)) != log_p(controller(decisions))
    assert fresh.load_state_dict(controller.state_dict())
    for other in (fresh, copy.deepcopy(controller)):
        assert log_p(other(decisions)) == log_p(controller(decisions))
        assert other().decisions == controller().decisions


def test_the_precision_follows_to() -> None:
    controller = built(dtype=torch.float32, **OPTIONS["micro"]).to(torch.float64)
    answer = controller(generator=generator())
    tensors = [*answer.log_prob.values(), *answer.probabilities.values()]
    tensors += [answer.entropy, answer.skip_penalty]
    assert {t.dtype for t in tensors} == {torch.float64}


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "decision", "message"),
    [
        ("n/op0", None, "no decision for 'n/op0'"),
        ("r/in2", None, "no decision for 'r/in2'"),
        ("n/op0", "relu", "'n/op0': 'relu' is no candidate"),
        ("n/op0", (0,), "is no candidate"),
        ("r/in2", (0,), "'r/in2'.*n_chosen is 2"),
        ("r/in2", (0, 4), "'r/in2'.*below 4"),
        ("n/in1", (0, 0), "distinct"),
        ("n/in1", "conv", "'n/in1'.*below 2"),
    ],
)
def test_what_cannot_be_scored(label: str, decision: Any, message: str) -> None:
    controller = built()
    decisions: dict[str, Any] = dict(controller().decisions)
    if decision is None:
        del decisions[label]
    else:
        decisions[label] = decision
    with pytest.raises(SearchError, match=message):
        controller(decisions)


@pytest.mark.parametrize("source", [None, generator()])
def test_values_that_are_not_finite(source: torch.Generator | None) -> None:
    controller = built()
    with torch.no_grad():
        controller.attention["v"].fill_(math.nan)
    with pytest.raises(SearchError, match=r"'n/in1' are \[nan, nan\].*diverged"):
        controller(generator=source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0.*positive"),
        ({"tanh_constant": -1.0}, "tanh_constant"),
        ({"op_tanh_reduce": 0.0}, "op_tanh_reduce"),
        ({"hidden": 0}, "hidden"),
        ({"skip_target": 1.0}, "between 0 and 1"),
        ({"skip_target": 0.0}, "between 0 and 1"),
        ({"op_bias": {"con": 1.0}}, "op_bias: no candidate 'con'"),
        ({"fixed_bias": {"n/op9": {"conv": 1.0}}}, "no layer choice has a label like 'n/op9'"),
        ({"fixed_bias": {"n/in*": {"conv": 1.0}}}, "no layer choice has a label like"),
        ({"fixed_bias": {"n/*": {"relu": 1.0}}}, "bias 'n/\\*': no candidate 'relu'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Controller(MIXED, generator=generator(), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", (), 0, 1), "n=0"),
        (("a", ("x", "y"), 3, 1), "3 distinct names"),
        (("a", ("x", "x"), 2, 1), "2 distinct names"),
        (("a", ("x", "y"), 2, 1, (None, None)), "no sources"),
        (("a", None, 2, 3), "between 1 and n=2"),
        (("a", None, 2, 0), "between 1 and n=2"),
        (("a", None, 2, 1, (None,)), "1 sources for 2 inputs"),
    ],
)
def test_questions_that_contradict_themselves(arguments: Any, message: str) -> None:
    with pytest.raises(SearchError, match=message):
        Question(*arguments)


def test_questions_that_contradict_each_other() -> None:
    with pytest.raises(SearchError, match="two questions have the label 'n/op0'"):
        Controller((MIXED[0], MIXED[0]), generator=generator())
    with pytest.raises(SearchError, match="source 'n/op0', which is no earlier question"):
        Controller((MIXED[1], MIXED[0]), generator=generator())
    with pytest.raises(SearchError, match="source 'a'"):
        Controller((Question("a", None, 1, None, ("a",)),), generator=generator())
