"""The recurrent controller of ENAS, for any list of decisions; it knows nothing of graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfx.choice import Decision, checked_indices
from nasfx.errors import SearchError, SpaceError
from nasfx.ops.gates import draw_subset, inclusion_probabilities, log_subsets


@dataclass(frozen=True)
class Question:
    """One decision that a controller takes.

    Attributes:
        label: the decision's name.
        names: the candidates of a layer choice, in order; None for an input choice.
        n: how many candidates there are.
        n_chosen: of an input choice: how many inputs are chosen, None for any subset.
        sources: of an input choice: for each input the label of the earlier question that it comes
            from, or None if it comes from none; () if none of them does. Inputs with one source are
            always equally probable.

    Raises:
        SearchError: counts that contradict each other, or are out of range.
    """

    label: str
    names: tuple[str, ...] | None
    n: int
    n_chosen: int | None
    sources: tuple[str | None, ...] = ()

    def __post_init__(self) -> None:
        where = f"question {self.label!r}"
        if self.n < 1:
            raise SearchError(f"{where}: n={self.n} must be at least 1")
        if self.names is not None:
            if len(self.names) != self.n or len(set(self.names)) != self.n:
                raise SearchError(f"{where}: names={self.names} must be {self.n} distinct names")
            if self.sources:
                raise SearchError(f"{where}: a layer choice has no sources; leave them out")
            return
        if self.n_chosen is not None and not 1 <= self.n_chosen <= self.n:
            raise SearchError(
                f"{where}: n_chosen={self.n_chosen} must be between 1 and n={self.n}, or None for "
                "any subset"
            )
        if self.sources and len(self.sources) != self.n:
            raise SearchError(
                f"{where}: {len(self.sources)} sources for {self.n} inputs; give one for each"
            )

    @property
    def unsourced(self) -> int:
        """How many inputs come from no question."""
        if self.names is not None:
            return 0
        return self.sources.count(None) if self.sources else self.n

    @property
    def count(self) -> int | None:
        """How many candidates are chosen; None for any number."""
        return 1 if self.names is not None else self.n_chosen


class Answer(NamedTuple):
    """What a controller answers to all its questions.

    Attributes:
        decisions: by label the candidate's name, or the ascending indices of the inputs.
        log_prob: by label log p(decision | the decisions before), in nats, 0-d, differentiable.
        entropy: the sum over all questions, in nats, 0-d, detached.
        skip_penalty: the mean over the any-subset questions, 0-d, differentiable; 0 without any.
        probabilities: by label the probability that each candidate is chosen, or among the chosen,
            given the decisions before, shape (n,), detached.
    """

    decisions: dict[str, Decision]
    log_prob: dict[str, Tensor]
    entropy: Tensor
    skip_penalty: Tensor
    probabilities: dict[str, Tensor]


class Controller(nn.Module):
    """An LSTM that takes decisions one after the other, each with what it chose before as input.

    Source: ENAS (arXiv 1802.03268), section 2, and the authors' macro and micro controllers.

    Before each question comes one step of the LSTM, with output h; the first reads the learned
    `g_emb`. What is decided next, with `/ temperature` where one is set:

    - Layer choice: logits W h + b, then (tanh_constant / op_tanh_reduce) tanh(logits) where a
      constant is set, then plus the fixed bias; p = softmax. The next step reads the embedding of
      the chosen candidate. W, b and embeddings are shared by all questions with equal `names`.
    - Input choice: q_j = v . tanh(W1 a_j + W2 h), then tanh_constant tanh(q). The anchor a_j is the
      LSTM's output at the source's question. The i-th input without a source has the i-th of the
      learned anchors, which all questions share.
      Any subset: each input by itself, p(yes) = softmax([-q_j, q_j])[1]; the next step reads the
      sum of the chosen anchors over (1 + how many). k inputs: subsets S of size k with p(S)
      proportional to exp(sum of q over S); the next step reads the mean of the chosen anchors.

    Entropy: with CE = -log p of what was decided, CE exp(-CE) for each layer choice, each set of k
    inputs and each input of an any-subset choice, as in the authors' macro controller. With
    `exact_entropy` it is -sum p log p, as in their micro controller; for sets of more than one
    input it stays CE exp(-CE).

    Skip penalty: for an any-subset question the sum over its inputs and over l in the scaled pair
    [-q, q] of sigmoid(l) log(sigmoid(l) / t), with t = 1 - skip_target and skip_target. As in the
    authors' code it is sigmoid(q) that is drawn to skip_target, and not p(yes) = sigmoid(2 q).

    Other than in the authors' code the LSTM has biases, the macro form has a b (from 0) too, and
    every step is for a question. Their macro controller takes one more step for the first layer,
    which has no skips. Their micro controller takes one more for each input of a cell and for the
    anchor of each node, begins every node from `g_emb`, and lets the next step read zeros for a
    chosen input of the cell; the outputs of those steps are its anchors, not parameters.

    Args:
        questions: the decisions, in the order in which they are taken.
        hidden: the width of the LSTM.
        temperature: divides logits; None for 1.
        tanh_constant: bounds logits; None for no bound.
        op_tanh_reduce: divides the bound for layer choices.
        skip_target: the penalty's target for p(yes), between 0 and 1.
        exact_entropy: see above.
        op_bias: the initial b by candidate name; 0 for others.
        fixed_bias: by pattern (fnmatch) of layer choices' labels, the bias by candidate name that
            is not learned. Biases of several patterns that fit add up.
        generator: on the CPU; draws all parameters but b from uniform(-0.1, 0.1).
        dtype: of the parameters.

    Raises:
        SearchError: labels that occur twice, sources that are no earlier questions, options out of
            range, or biases that belong to nothing.

    Example:
        >>> ops = ("conv", "pool")
        >>> questions = [Question("op0", ops, 2, 1), Question("op1", ops, 2, 1)]
        >>> questions.append(Question("skips", None, 2, None, ("op0", "op1")))
        >>> controller = Controller(questions, generator=torch.Generator().manual_seed(0))
        >>> controller(generator=torch.Generator().manual_seed(1)).decisions
        {'op0': 'conv', 'op1': 'pool', 'skips': (1,)}
    """

    def __init__(
        self,
        questions: Sequence[Question],
        *,
        hidden: int = 64,
        temperature: float | None = None,
        tanh_constant: float | None = None,
        op_tanh_reduce: float = 1.0,
        skip_target: float = 0.4,
        exact_entropy: bool = False,
        op_bias: Mapping[str, float] = {},
        fixed_bias: Mapping[str, Mapping[str, float]] = {},
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_order(questions)
        positive = {"hidden": hidden, "temperature": temperature, "tanh_constant": tanh_constant}
        for name, value in (positive | {"op_tanh_reduce": op_tanh_reduce}).items():
            if value is not None and not value > 0:
                raise SearchError(f"{name}={value!r} of the controller must be positive")
        if not 0 < skip_target < 1:
            raise SearchError(f"skip_target={skip_target!r} must lie between 0 and 1")
        self.questions = tuple(questions)
        self.temperature, self.tanh_constant = temperature, tanh_constant
        self.op_tanh_reduce, self.skip_target = op_tanh_reduce, skip_target
        self.exact_entropy = exact_entropy
        self.fixed_bias = _fixed_biases(questions, fixed_bias)

        def uniform(*shape: int) -> nn.Parameter:
            values = torch.empty(shape, dtype=torch.float64)
            return nn.Parameter(values.uniform_(-0.1, 0.1, generator=generator).to(dtype))

        # By way of the meta device, so that torch's global generator is not read.
        self.lstm = nn.LSTMCell(hidden, hidden, device="meta", dtype=dtype).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.lstm.parameters():
                parameter.copy_(uniform(*parameter.shape))
        self.g_emb = uniform(hidden)
        # Nothing is created that no question reads: it would never get a gradient.
        self.w_soft, self.b_soft = nn.ParameterDict(), nn.ParameterDict()
        self.embeddings, self.attention = nn.ParameterDict(), nn.ParameterDict()
        tuples = list(dict.fromkeys(q.names for q in questions if q.names is not None))
        _check_names(op_bias, {name for names in tuples for name in names}, "op_bias")
        self._keys = {names: str(i) for i, names in enumerate(tuples)}
        for names, key in self._keys.items():
            biases = [op_bias.get(name, 0.0) for name in names]
            self.w_soft[key] = uniform(len(names), hidden)
            self.b_soft[key] = nn.Parameter(torch.tensor(biases, dtype=dtype))
            if any(q.names == names for q in questions[:-1]):
                self.embeddings[key] = uniform(len(names), hidden)
        inputs = [q for q in questions if q.names is None]
        if inputs:
            self.attention["w_1"] = uniform(hidden, hidden)
            self.attention["w_2"] = uniform(hidden, hidden)
            self.attention["v"] = uniform(hidden)
        if unsourced := max((q.unsourced for q in inputs), default=0):
            self.attention["anchors"] = uniform(unsourced, hidden)

    def forward(
        self,
        decisions: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Answer:
        """Answer all questions, in order.

        Args:
            decisions: what to score, for every question; other labels are not looked at.
            generator: on the CPU; without `decisions`, draws them, in float64. Without both, the
                most probable decision is taken at each step: ties go to the first, and an input of
                an any-subset choice is chosen at probability 1/2.

        Raises:
            SearchError: a decision is missing or no candidate; probabilities that are not finite.
        """
        forced = None if decisions is None else _indices(self.questions, decisions)
        made: dict[str, Decision] = {}
        log_prob: dict[str, Tensor] = {}
        probabilities: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        entropy = skip_penalty = self.g_emb.new_zeros(())
        x, h, c = self.g_emb, torch.zeros_like(self.g_emb), torch.zeros_like(self.g_emb)
        for question in self.questions:
            label = question.label
            h, c = self.lstm(x, (h, c))
            outputs[label] = h
            anchors = None if question.names is not None else self._anchors(question, outputs)
            scores = self._op_scores(question, h) if anchors is None else self._scores(anchors, h)
            chosen = forced[label] if forced else _decided(question, scores, generator)
            made[label] = chosen if question.names is None else question.names[chosen[0]]
            terms, its_entropy = _log_probabilities(question, scores, chosen, self.exact_entropy)
            log_prob[label] = terms.sum()
            entropy = entropy + its_entropy
            alpha = _alpha(question, scores.detach())
            probabilities[label] = inclusion_probabilities(alpha, question.count)
            if question.count is None:
                skip_penalty = skip_penalty + self._skip_penalty(scores)
            x = self._next_input(question, chosen, anchors)
        any_subset = sum(question.count is None for question in self.questions)
        return Answer(made, log_prob, entropy, skip_penalty / max(any_subset, 1), probabilities)

    def extra_repr(self) -> str:
        """How many decisions are taken."""
        return f"{len(self.questions)} questions"

    def _op_scores(self, question: Question, h: Tensor) -> Tensor:
        assert question.names is not None
        key = self._keys[question.names]
        bound = None if self.tanh_constant is None else self.tanh_constant / self.op_tanh_reduce
        scores = self._scaled(self.w_soft[key] @ h + self.b_soft[key], bound)
        if question.label in self.fixed_bias:
            scores = scores + scores.new_tensor(self.fixed_bias[question.label])
        return scores

    def _anchors(self, question: Question, outputs: Mapping[str, Tensor]) -> Tensor:
        """Shape (inputs, hidden)."""
        rows: list[Tensor] = []
        unsourced = 0
        for source in question.sources or (None,) * question.n:
            if source is None:
                rows.append(self.attention["anchors"][unsourced])
                unsourced += 1
            else:
                rows.append(outputs[source])
        return torch.stack(rows)

    def _scores(self, anchors: Tensor, h: Tensor) -> Tensor:
        """Shape (inputs,)."""
        seen = anchors @ self.attention["w_1"].T + self.attention["w_2"] @ h
        return self._scaled(torch.tanh(seen) @ self.attention["v"], self.tanh_constant)

    def _scaled(self, logits: Tensor, bound: float | None) -> Tensor:
        if self.temperature is not None:
            logits = logits / self.temperature
        return logits if bound is None else bound * torch.tanh(logits)

    def _skip_penalty(self, scores: Tensor) -> Tensor:
        pairs = torch.stack((-scores, scores), 1)
        targets = scores.new_tensor([1 - self.skip_target, self.skip_target])
        return (torch.sigmoid(pairs) * (F.logsigmoid(pairs) - targets.log())).sum()

    def _next_input(
        self, question: Question, chosen: tuple[int, ...], anchors: Tensor | None
    ) -> Tensor:
        if question is self.questions[-1]:
            return self.g_emb  # which nothing reads
        if anchors is None:
            assert question.names is not None
            return self.embeddings[self._keys[question.names]][chosen[0]]
        total = anchors[list(chosen)].sum(0)
        return total / (len(chosen) if question.n_chosen is not None else 1 + len(chosen))


def _check_order(questions: Sequence[Question]) -> None:
    earlier: set[str] = set()
    for question in questions:
        if question.label in earlier:
            raise SearchError(f"two questions have the label {question.label!r}; ask each once")
        for source in question.sources:
            if source is not None and source not in earlier:
                raise SearchError(
                    f"question {question.label!r} has the source {source!r}, which is no earlier "
                    "question; ask that one first, or give None"
                )
        earlier.add(question.label)


def _check_names(biases: Mapping[str, float], names: set[str], where: str) -> None:
    if unknown := set(biases) - names:
        raise SearchError(f"{where}: no candidate {min(unknown)!r}; there are {sorted(names)}")


def _fixed_biases(
    questions: Sequence[Question], fixed_bias: Mapping[str, Mapping[str, float]]
) -> dict[str, list[float]]:
    """By label of a layer choice, the sum over the patterns that fit, in the candidates' order."""
    totals: dict[str, list[float]] = {}
    layers = {q.label: q.names for q in questions if q.names is not None}
    for pattern, biases in fixed_bias.items():
        fitting = {label: names for label, names in layers.items() if fnmatchcase(label, pattern)}
        if not fitting:
            raise SearchError(
                f"fixed_bias: no layer choice has a label like {pattern!r}; the labels are "
                f"{sorted(layers)}"
            )
        _check_names(biases, {n for names in fitting.values() for n in names}, f"bias {pattern!r}")
        for label, names in fitting.items():
            before = totals.get(label, [0.0] * len(names))
            totals[label] = [
                b + biases.get(name, 0.0) for b, name in zip(before, names, strict=True)
            ]
    return totals


def _indices(
    questions: Sequence[Question], decisions: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The decisions to be scored as indices of candidates."""
    found: dict[str, tuple[int, ...]] = {}
    for question in questions:
        label, names = question.label, question.names
        if label not in decisions:
            raise SearchError(f"there is no decision for {label!r} to score; give one for each")
        decision = decisions[label]
        if names is not None:
            if decision not in names:
                raise SearchError(f"{label!r}: {decision!r} is no candidate; there are {names}")
            found[label] = (names.index(decision),)
            continue
        try:
            found[label] = checked_indices(decision, question.n, question.n_chosen, repr(label))
        except SpaceError as error:
            raise SearchError(f"cannot be scored: {error}") from error
    return found


def _alpha(question: Question, scores: Tensor) -> Tensor:
    """The parameters of `inclusion_probabilities`: softmax([-q, q])[1] = sigmoid(2 q)."""
    return scores if question.count is not None else 2 * scores


def _decided(
    question: Question, scores: Tensor, generator: torch.Generator | None
) -> tuple[int, ...]:
    """Draw, or without a generator take the most probable; in float64 on the CPU."""
    alpha = _alpha(question, scores.detach().to("cpu", torch.float64))
    if not alpha.isfinite().all():
        raise SearchError(
            f"the logits of {question.label!r} are {alpha.tolist()}: the controller has diverged; "
            "lower its learning rate, or set tanh_constant"
        )
    if generator is None:
        values = alpha.tolist()
        if question.count is None:
            return tuple(i for i, value in enumerate(values) if value >= 0)
        best = sorted(range(question.n), key=lambda i: -values[i])
        return tuple(sorted(best[: question.count]))
    if question.names is not None:
        return (int(torch.multinomial(torch.softmax(alpha, 0), 1, generator=generator)),)
    return draw_subset(alpha, question.n_chosen, generator)


def _log_probabilities(
    question: Question, scores: Tensor, chosen: tuple[int, ...], exact_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log p of each independent draw that makes a decision, shape (draws,), and the entropy."""
    count = question.count
    if count is None:
        log_p = torch.log_softmax(torch.stack((-scores, scores), 1), 1)
        taken = log_p[list(range(question.n)), [int(i in chosen) for i in range(question.n)]]
    elif count == 1:
        log_p = torch.log_softmax(scores, 0)
        taken = log_p[list(chosen)]
    else:
        values = list(scores.unbind(0))
        # Added up in the order of `log_subsets`, so that log p of all inputs is exactly 0.
        total = sum((values[i] for i in chosen), torch.zeros_like(values[0]))
        log_p = taken = (total - log_subsets(values, count)).reshape(1)
    terms = (log_p if exact_entropy else taken).detach()
    return taken, -(terms.exp() * terms).sum()
