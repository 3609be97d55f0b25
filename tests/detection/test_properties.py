"""Properties of verdicts, on generated loops: what must not change them, and what they must name."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equivcheck import strategies
from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.report import words
from equivcheck.rows import written
from equivcheck.split import block_permutation, cut
from equivcheck.strategies import Cut, Loop
from equivcheck.subject import load_subject

# Four examples in the default profile and 80 in "thorough" (`make properties`): each runs up to four cases of a tenth
# of a second. `make search` draws ten thousand.
QUICK = settings(
    max_examples=settings.default.max_examples // 25, suppress_health_check=list(HealthCheck)
)
# torch says once, in a process, that a float32 norm is given what autocast has cast.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants"
# Faults of the weights of micro-batches, whose effect is zero exactly where those weights are equal.
MEANS = ("eq103_mean_of_means_samples", "eq103_mean_of_means_tokens")
ALWAYS = (
    "eq101_missing_division_plain",
    "eq101_missing_division_ragged",
    "eq102_double_division_tokens",
    "eq301_zero_grad_in_cycle",
    "eq306_clip_by_norm",
)


def judged(subject, how, **fields):
    return run_case(load_subject(subject), Case(repr(subject), **how.keywords, **fields))


@st.composite
def points(draw, **parts):
    loop = draw(strategies.loops(**parts))
    return loop, draw(strategies.cuts(loop.batches, limit=7))


@dataclass(frozen=True, repr=False)
class Undivided(Loop):
    """A loop that sums the means of its micro-batches."""

    def summed(self, model, batch):
        return super().summed(model, batch) * (1 if model.whole else 2)

    def train(self, model, loader, accumulation_steps):
        model.whole = accumulation_steps == 1
        return super().train(model, loader, accumulation_steps)


@dataclass(frozen=True, repr=False)
class OneParameter(Loop):
    """A loop that scales the accumulated gradient of one parameter."""

    def finish(self, model, cycle, total):
        if len(cycle) > 1:
            model.head.weight.grad *= 1.001
        super().finish(model, cycle, total)


@dataclass(frozen=True, repr=False)
class MeanOfMeans(Loop):
    """A loop that gives every micro-batch the same weight, in its gradients and in its log."""

    def accumulate(self, model, cycle, total):
        logged = 0.0
        for batch in cycle:
            loss = self.summed(model, batch) / self.count(batch) / len(cycle)
            loss.backward()
            logged += float(loss.detach())
        return logged


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("rows", [(3,), (3, 3)], ids=["one-step", "two-steps"])
def test_what_is_left_after_the_proof_is_told_apart_from_the_log(rows, seed):
    """The log has the same wrong weights and stays wrong; the number called noise is that of the gradients."""
    case = judged(MeanOfMeans(strategies.Values(rows=rows, seed=seed)), Cut(2, "uneven"))

    [cause] = case["causes"]
    done = cause["evidence"]["intervention"]
    assert cause["code"] == "EQ103"
    assert done["relative_before"] > 1e-2
    assert done["relative_after"] <= case["detection_power"]
    assert done["logged_after"] > 1e-3
    lines = words.evidence(case, cause)
    assert lines[0].endswith(f"-> {words.number(done['relative_after'])}, within noise")
    assert f"{words.number(done['logged_after'])} is left in them" in lines[1]
    assert case["interventions"][-1]["within_noise"]


@QUICK
@given(points())
def test_any_composition_of_correct_parts_is_equivalent(point):
    loop, how = point
    case = judged(loop, how)

    assert case["verdict"] == "equivalent", case["headline"]


@QUICK
@given(
    points(precision=st.just("float32"), scale=st.just(1.0)),
    st.sampled_from([1e-6, 1e-3, 1e3, 1e6]),
)
def test_scaling_the_loss_keeps_the_verdict(point, scale):
    """No threshold is absolute: right stays right, and wrong stays wrong by the same cause."""
    loop, how = point
    for kind in (Loop, Undivided):
        parts = {name: getattr(loop, name) for name in loop.__dataclass_fields__}
        plain = judged(kind(**parts), how)
        scaled = judged(kind(**{**parts, "scale": scale}), how)

        assert scaled["verdict"] == plain["verdict"], (plain["headline"], scaled["headline"])
        assert [c["code"] for c in scaled["causes"]] == [c["code"] for c in plain["causes"]]


@QUICK
@given(points(precision=st.just("float32"), max_norm=st.none()))
def test_permuting_micro_batches_keeps_the_verdict(point):
    """Which micro-batch comes first decides nothing, in a right loop and in a wrong one."""
    loop, how = point
    loop = replace(loop, batches=loop.batches)
    rows = []
    for number, count in enumerate(loop.batches.rows):
        if count < how.accumulation_steps:
            return
        sizes, begin, slices = cut(count, how.accumulation_steps, "even"), 0, []
        for size in sizes:
            slices.append((begin, begin + size))
            begin += size
        rows.append((number, list(block_permutation(slices, 0))))
    how = replace(how, split="even")
    for kind in (Loop, Undivided):
        parts = {name: getattr(loop, name) for name in loop.__dataclass_fields__}
        plain, permuted = judged(kind(**parts), how), judged(kind(**parts), how, rows=written(rows))

        assert permuted["verdict"] == plain["verdict"], (plain["headline"], permuted["headline"])


@QUICK
@given(points(precision=st.sampled_from(["float32", "float64"]), max_norm=st.none()))
def test_a_fault_in_one_parameter_is_reported_in_that_parameter(point):
    """It is found whatever is around it, and no other parameter is named."""
    loop, how = point
    parts = {name: getattr(loop, name) for name in loop.__dataclass_fields__}
    case = judged(OneParameter(**parts), how)

    assert case["verdict"] == "divergent"
    off = {
        row["name"]
        for row in case["per_parameter"]
        if (row["relative"] or 0) > 1e-6 and not row["zero"]
    }
    assert off == {"head.weight"}


def loaded(name):
    subject = load_subject(str(MUTANTS / f"{name}.py"))
    stated = vars(sys.modules[subject.fresh().train.__module__])
    return subject, stated["EXPECT"]


@pytest.mark.parametrize("name", ALWAYS + MEANS)
def test_a_mutant_is_detected_in_any_rows_of_its_batches(name):
    """Where its effect is zero (micro-batches of equal weight) the verdict is `equivalent`; else its code is named."""
    subject, codes = loaded(name)

    @QUICK
    @given(st.data())
    def search(data):
        rows = data.draw(st.lists(st.integers(0, 15), min_size=3, max_size=9, unique=True))
        k = data.draw(st.integers(2, min(4, len(rows))))
        how = data.draw(st.sampled_from(["even", "uneven"]))
        case = run_case(subject, Case(subject.target, k, split=how, rows=written([(0, rows)])))
        found = {cause["code"] for cause in case["causes"]}
        if name in MEANS and case["verdict"] == "equivalent":
            weights = case["attribution"] or {}
            sizes = cut(len(rows), k, how)
            assert is_zero(subject, rows, sizes), weights
        else:
            assert set(codes) <= found, (case["headline"], rows, k, how)

    search()


def is_zero(subject, rows, sizes):
    """Return whether every micro-batch has the same weight: rows, or labels after the causal shift."""
    batch = subject.fresh().batches()[0]
    labels = batch.get("labels")
    each = torch.ones(16) if labels is None else (labels[:, 1:] != -100).sum(1).float()
    chosen = each[torch.tensor(rows)]
    return len({float(part.sum()) for part in chosen.split(sizes)}) == 1
