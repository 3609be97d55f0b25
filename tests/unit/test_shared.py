"""Faults that both runs share: each is claimed only where putting it right in the reference changes it."""

from __future__ import annotations

import pytest

from equivcheck.differences import Sums
from equivcheck.errors import EquivcheckError
from equivcheck.recording import Backward, Event, Kept, Recording, Step
from equivcheck.shared import shared_faults, skipped_steps
from equivcheck.verdict import Noise


def step(index=0, *, relative=0.0, skipped=False, matched=0):
    found = Step(index, "SGD", frozenset({(index, 0)}), 1, 0, [0.1], matched=matched)
    found.gradients = found.applied = {"w": Sums(1.0, 0.0, relative**2, 1)}
    found.skipped = skipped
    return found


def recording(*steps, events=(), scalar=1.0, loss_scale=1.0):
    kept = Kept({}, {}, {}, {}, {}, {}, {"w": 1.0})
    backwards = [Backward(0, 1, 1.0, loss_scale, "MulBackward0", root_scalar=scalar)]
    return Recording(
        "any",
        steps=list(steps),
        timeline=list(events),
        backwards=backwards,
        kept=[kept for _ in steps],
    )


class Lab:
    """An experiment of which the reference is known, and what an intervention makes of it."""

    def __init__(self, reference, altered=None, native=None):
        self._reference, self._altered, self._native = reference, altered, native
        self.put_right = []
        self.remembered = {"kept sums": None}

    def reference(self):
        return self._reference

    candidate = reference

    def noise(self):
        return Noise(2, [])

    def native(self, _role):
        return self._native

    def altered_reference(self, interventions):
        self.put_right += [each.name for each in interventions]
        if self._altered is None:
            raise EquivcheckError("no run")
        return self._altered


def rescaled(scale, rest=0.0, backwards=1):
    return Event("rescaled", backwards, 1, {"scale": scale, "rest": rest})


EVENTS = {
    "left from before": (Event("leftover", 1, 1), 1.0, "EQ302"),
    "a clip under a scaler": (Event("clip", 1, 1, {"scale": 256.0}), 1.0, "EQ405"),
    "divided after the clip": (rescaled(1 / 256), 256.0, "EQ405"),
}


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize(
    ("altered", "claimed"),
    [(recording(step(relative=0.5)), True), (recording(step()), False), (None, False)],
    ids=["changes", "changes nothing", "cannot be run"],
)
def test_a_fault_is_claimed_if_the_reference_changes_without_it(name, altered, claimed):
    event, scalar, code = EVENTS[name]
    lab = Lab(recording(step(), events=[event], scalar=scalar), altered)
    found = shared_faults(lab)

    assert [each.code for each in found] == ([code] if claimed else [])
    assert all(each.shared and each.proved for each in found)
    assert len(lab.put_right) == 1


@pytest.mark.parametrize(
    "event",
    [
        rescaled(0.5),
        rescaled(1 / 256, rest=0.1),
        rescaled(1 / 256, backwards=0),
        Event("clip", 1, 1, {"scale": 1.0}),
    ],
    ids=["another factor", "no pure factor", "before any backward", "a clip without a scale"],
)
def test_what_is_no_loss_scale_by_hand_is_not_even_tried(event):
    lab = Lab(recording(step(), events=[event], scalar=256.0), recording(step(relative=0.5)))

    assert shared_faults(lab) == []
    assert lab.put_right == []


@pytest.mark.parametrize(("relative", "claimed"), [(0.5, True), (0.0, False)])
def test_a_gradient_that_is_not_the_objectives_is_a_fault(relative, claimed):
    off = step()
    off.objective = {"w": Sums(1.0, 0.0, relative**2, 1)}

    assert [each.code for each in shared_faults(Lab(recording(off)))] == ["EQ110"] * claimed


@pytest.mark.parametrize(
    ("native", "claimed"),
    [
        ([step(), step(1, matched=1)], False),
        ([step(skipped=True), step(1, matched=1)], True),
        ([step(1, matched=1)], True),
    ],
    ids=["both taken", "skipped", "left out"],
)
def test_a_step_that_the_arithmetic_as_written_leaves_out_is_a_fault(native, claimed):
    promoted = recording(step(), step(1, matched=1))
    lab = Lab(promoted, native=recording(*native, loss_scale=2.0**40))
    found = skipped_steps(lab)

    assert [each.code for each in found] == ["EQ404"] * claimed
    assert all(each.evidence["optimizer_steps"] == [0] for each in found)
    assert all(each.evidence["loss_scales"] == [2.0**40] for each in found)
