"""Sums that a loop keeps of its own gradients: how much of an earlier step is in a later one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from equivcheck.detectors import stale
from equivcheck.errors import EquivcheckError
from equivcheck.feed import Data
from equivcheck.recording import Step
from equivcheck.sums import kept_sums, weight_of_earlier
from equivcheck.verdict import Finding, Judgement

FIRST = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
SECOND = torch.tensor([4.0, -3.0, 2.0, -1.0], dtype=torch.float64)
OTHER = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)


def a_step(index, gradient, optimizer="SGD", **more):
    """Return a step of one parameter, on the samples of one full batch of two rows."""
    samples = frozenset({(0, 2 * index), (0, 2 * index + 1)})
    norm = 0.0 if gradient is None else float(gradient.norm())
    return Step(
        index,
        optimizer,
        samples,
        index + 1,
        index,
        [0.1],
        matched=index,
        norm=norm,
        sample={"w": gradient},
        **more,
    )


def an_experiment(*gradients, alone=(FIRST, SECOND), contributed=None, **more):
    """Return what is asked of an experiment: its steps, and what each full batch gives alone."""
    steps = [
        a_step(i, gradient, handed_over=contributed is None) for i, gradient in enumerate(gradients)
    ]

    def full_batch_alone(index):
        if alone is None:
            raise EquivcheckError("the loop refuses it")
        return SimpleNamespace(
            steps=[
                a_step(index, alone[index], **({"optimizer": more["by"]} if "by" in more else {}))
            ]
        )

    batches = more.get("batches", 2)
    native = [
        a_step(i, gradient, contributions=[] if contributed is None else contributed[i])
        for i, gradient in enumerate(gradients)
    ]
    found = {
        "remembered": {},
        "other_steps": True,
        "wants": set(),
        "case": SimpleNamespace(world_size=1),
        "has_native": True,
        "data": Data([None, None][:batches], [2, 2][:batches]),
        "reference": lambda: SimpleNamespace(steps=steps, optimizers={"SGD": ["w"]}),
        "native": lambda _role: SimpleNamespace(steps=native),
        "full_batch_alone": full_batch_alone,
    }
    return SimpleNamespace(**{**found, **{k: v for k, v in more.items() if k in found}})


@pytest.mark.parametrize(
    ("second", "weight"),
    [
        (SECOND + FIRST, 1.0),
        (SECOND + 0.25 * FIRST, 0.25),
        (SECOND, 0.0),
        (2.0 * SECOND + FIRST, None),  # its own gradient is in it once, or it is something else
        (SECOND + OTHER, None),
    ],
    ids=["whole", "a quarter", "none", "its own twice", "something else"],
)
def test_the_weight_of_the_step_before_is_read_from_what_each_gives_alone(second, weight):
    experiment = an_experiment(FIRST, second)
    first, step = experiment.reference().steps

    found = weight_of_earlier(experiment, step, first)

    assert found == (None if weight is None else pytest.approx(weight, abs=1e-12))


def test_a_step_before_without_a_gradient_has_no_weight():
    experiment = an_experiment(0.0 * FIRST, SECOND)
    first, step = experiment.reference().steps

    assert weight_of_earlier(experiment, step, first) is None


@pytest.mark.parametrize("more", [{"alone": None}, {"batches": 1}, {"by": "Adam"}])
def test_a_full_batch_that_cannot_be_run_alone_tells_nothing(more):
    experiment = an_experiment(FIRST, FIRST + SECOND, **more)
    first, step = experiment.reference().steps

    assert weight_of_earlier(experiment, step, first) is None


def test_sums_that_still_hold_the_step_before_are_told_once():
    experiment = an_experiment(FIRST, FIRST + SECOND)

    evidence = kept_sums(experiment)

    assert evidence["optimizer_step"] == 1
    assert evidence["weight_of_earlier_gradients"] == [pytest.approx(1.0)]
    assert evidence["relative"] == pytest.approx(float(FIRST.norm() / (FIRST + SECOND).norm()))
    experiment.reference = None  # not asked again
    assert kept_sums(experiment) is evidence


@pytest.mark.parametrize(
    "more",
    [
        {"other_steps": False},
        {"wants": {"dataset"}},
        {"case": SimpleNamespace(world_size=2)},
    ],
)
def test_where_a_full_batch_cannot_be_set_apart_no_sums_are_told(more):
    assert kept_sums(an_experiment(FIRST, FIRST + SECOND, **more)) is None


def test_sums_that_are_started_anew_are_right():
    assert kept_sums(an_experiment(FIRST, SECOND)) is None


@pytest.mark.parametrize(
    ("contributed", "promoted", "told"),
    [
        ([[{"w": FIRST}], [{"w": SECOND}]], True, True),
        ([[{"w": FIRST}], [{"w": FIRST + SECOND}]], True, False),
        ([[{"w": FIRST}], [{"w": SECOND}]], False, False),
        ([[{"w": FIRST}], []], True, False),
    ],
    ids=["beside its backward", "what its backward made", "as written", "no backward"],
)
def test_gradients_that_no_backward_made_are_looked_into(contributed, promoted, told):
    """Sums that are added to the gradients of a step, beside what its own backward left there."""
    experiment = an_experiment(FIRST, FIRST + SECOND, contributed=contributed, has_native=promoted)

    assert (kept_sums(experiment) is not None) is told


def a_view(*steps, findings=(1,), chosen=(), **more):
    """Return what the detector is shown: an accumulated run, and which of its steps differ."""
    experiment = an_experiment(FIRST, FIRST + SECOND, **more)
    judgement = Judgement([Finding("gradients", i, i, ("w",), 0.5, 1e-9) for i in findings])
    candidate = SimpleNamespace(
        steps=[a_step(i, gradient) for i, gradient in enumerate(steps)], timeline=[], ranks=[]
    )
    return SimpleNamespace(
        experiment=experiment,
        judgement=judgement,
        chosen=chosen,
        candidate=candidate,
        reference=SimpleNamespace(timeline=[]),
    )


def test_stale_sums_explain_a_difference_that_is_all_theirs():
    """The accumulated run holds another share of the step before than the full batch does."""
    (found,) = stale.suspect(a_view(FIRST, SECOND + 0.5 * FIRST))

    assert (found.code, found.step, found.proved, found.shared) == ("EQ302", 1, True, True)


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ((FIRST, SECOND + OTHER), {}),
        ((OTHER, SECOND), {"findings": (0,)}),
        ((FIRST, SECOND + 0.5 * FIRST), {"findings": ()}),
        ((FIRST, SECOND + 0.5 * FIRST), {"chosen": ("something",)}),
        ((FIRST, SECOND + 0.5 * FIRST), {"other_steps": False}),
    ],
    ids=["something else", "no step before", "no difference", "put right", "no sums"],
)
def test_stale_sums_do_not_explain(steps, more):
    assert stale.suspect(a_view(*steps, **more)) == []
