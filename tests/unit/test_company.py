"""Weights in company: what each backward of the accumulated run added, as the pieces of the full batch."""

from __future__ import annotations

import pytest
import torch

from equivcheck.company import attributions_in_company
from equivcheck.errors import EquivcheckError
from equivcheck.recording import Backward, Event, Place, Recording, Step

WIDTH = 16
K = 2


def vector(seed):
    return torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ALONE = [vector(1), vector(2)]
MEAN = (ALONE[0] + ALONE[1]) / K
OTHER = vector(3)


def step(sample, added, *, backwards=K, matched=0):
    found = Step(0, "SGD", frozenset(), backwards, 0, [0.1], matched=matched)
    found.sample = {"w": sample, "unused": None}
    found.contributions = [{"w": each} for each in added]
    return found


def backwards(*losses):
    return [Backward(i, i + 1, loss, 1.0, "MulBackward0") for i, loss in enumerate(losses)]


def cycle(count=K):
    """Return the places of one cycle's backwards, in sweeps over its micro-batches."""
    return [Place(0, i % K, K, i % K == K - 1) for i in range(count)]


class Lab:
    """An experiment of which the accumulated run is known, and the micro-batches' losses alone (1 each)."""

    def __init__(self, accumulated, losses, *, full=MEAN, events=(), places=None, alone=True):
        self._reference = Recording("reference", [step(full, [])])
        self._contributed = Recording(
            "candidate", [accumulated], timeline=list(events), backwards=backwards(*losses)
        )
        self._schedule = cycle() if places is None else places
        self._alone = alone

    def reference(self, _interventions):
        return self._reference

    def contributed(self, _interventions):
        return self._contributed

    def schedule(self, _interventions=()):
        return self._schedule

    def cycles(self, _interventions):
        return {(0, 0): 0, (0, 1): 0}

    def pieces_recording(self, _interventions):
        if not self._alone:
            raise EquivcheckError("no run")
        fetched = [[(0, 0)], [(0, 1)]]
        return Recording("pieces", backwards=backwards(1.0, 1.0), fetched=fetched)


def weights(lab):
    """Return the true and the accumulated weights of the only step."""
    (found,) = attributions_in_company(lab, ())
    assert found.v.residual == pytest.approx(0.0, abs=1e-12)
    assert found.w.residual == pytest.approx(0.0, abs=1e-12)
    return list(found.v.solution), list(found.w.solution)


@pytest.mark.parametrize("alone", [True, False])
def test_a_loop_that_divides_has_the_weights_of_a_mean(alone):
    """Its losses are 1 / K of those of micro-batches alone; so is the guess where they cannot be run."""
    added = [each / K for each in ALONE]
    true, mine = weights(Lab(step(MEAN, added), [0.5, 0.5], alone=alone))

    assert true == pytest.approx([0.5, 0.5])
    assert mine == pytest.approx([0.5, 0.5])


def test_a_loop_that_forgets_to_divide_has_weights_of_one():
    true, mine = weights(Lab(step(MEAN * K, ALONE), [1.0, 1.0]))

    assert true == pytest.approx([0.5, 0.5])
    assert mine == pytest.approx([1.0, 1.0])


def test_losses_of_zero_tell_no_factor():
    """The pieces are then taken as divided by K, as most loops do."""
    true, _ = weights(Lab(step(MEAN, [each / K for each in ALONE]), [0.0, 0.0]))

    assert true == pytest.approx([0.5, 0.5])


def test_what_is_added_to_both_runs_before_the_step_is_taken_away_again():
    added = [each / K for each in ALONE]
    true, mine = weights(Lab(step(MEAN + OTHER, added), [0.5, 0.5], full=MEAN + OTHER))

    assert true == pytest.approx([0.5, 0.5])
    assert mine == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("kind", ["zero_grad", "cleared"])
def test_a_first_sweep_whose_gradients_were_dropped_is_no_piece(kind):
    added = [OTHER, OTHER, *(each / K for each in ALONE)]
    losses, dropped = [7.0, 7.0, 0.5, 0.5], [Event(kind, 2, 2)]
    lab = Lab(step(MEAN, added, backwards=4), losses, events=dropped, places=cycle(4))
    (found,) = attributions_in_company(lab, ())

    assert list(found.w.solution) == pytest.approx([0.5, 0.5])
    assert found.ordinals == frozenset({1})


@pytest.mark.parametrize(
    "lab",
    [
        Lab(step(MEAN, [MEAN], backwards=1), [1.0], places=[Place(0, 0, K, True)]),
        Lab(step(MEAN, ALONE, matched=None), [1.0, 1.0]),
        Lab(step(MEAN, ALONE), [1.0, 1.0], places=cycle(1)),
    ],
    ids=["a micro-batch without a backward", "no such step of the reference", "no such place"],
)
def test_a_step_that_cannot_be_fitted_has_no_weights(lab):
    assert attributions_in_company(lab, ()) == []
