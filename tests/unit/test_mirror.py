"""What another framework does is a backward and a step of the mirror, and what is set in the mirror comes back."""

from __future__ import annotations

import torch

from equivcheck.bridges.mirror import Link, Mirror
from equivcheck.interventions.backwards import Reweight
from equivcheck.observe import Observer
from equivcheck.recorder import Recorder
from equivcheck.recording import Place, Recording

START = torch.tensor([1.0, 2.0], dtype=torch.float64)


def rig(**options):
    mirror = Mirror({"w": START})
    recorder = Recorder(mirror, Recording("candidate"), Observer(), **options)
    return mirror, recorder


def test_a_gradient_becomes_a_backward_with_its_loss():
    mirror, recorder = rig()
    with recorder:
        link = Link(mirror, recorder)
        added = link.backward(torch.tensor(3.0), {"w": START})

    assert [3.0] == [each.loss for each in recorder.recording.backwards]
    assert torch.equal(START, added["w"])


def test_the_factor_of_an_intervention_comes_back():
    schedule = [Place(0, 0, 1, last=True)]
    mirror, recorder = rig(interventions=[Reweight({0: [0.25]})], schedule=schedule)
    with recorder:
        added = Link(mirror, recorder).backward(torch.tensor(3.0), {"w": START})

    assert torch.equal(START / 4, added["w"])


def test_an_update_becomes_a_step_with_the_gradient_that_entered():
    mirror, recorder = rig()
    seen = {}

    class Looks(Observer):
        def gradients(self, recorder, step, gradients, applied):
            seen.update(gradients)

    recorder.observer = Looks()
    with recorder:
        link = Link(mirror, recorder)
        link.backward(torch.tensor(3.0), {"w": START})
        link.entering({"w": START * 7}, {"0.mu.w": START * 2, "0.count": torch.tensor(1.0)})
        after = link.step({"w": START - 1})

    assert torch.equal(START * 7, seen["w"])
    assert torch.equal(START - 1, after["w"])
    assert 1 == len(recorder.recording.steps)
    assert {"0.mu.w", "0.count"} == set(link.optimizer.state[link.parameters["w"]])


def test_what_is_set_in_the_mirror_reaches_the_code():
    """Also where the code asks for another point than the one it holds: that keeps its distance."""
    mirror, recorder = rig()
    with recorder:
        link = Link(mirror, recorder)
        assert torch.equal(START, link.current({"w": START})["w"])
        with torch.no_grad():
            link.parameters["w"].copy_(START * 10)

        assert torch.equal(START * 10, link.current({"w": START})["w"])
        assert torch.equal(START * 10 + 0.5, link.current({"w": START + 0.5})["w"])


def test_optimizer_state_that_is_set_reaches_the_code():
    mirror, recorder = rig()
    state = {"0.mu.w": START * 2, "0.count": torch.tensor(1.0)}
    with recorder:
        link = Link(mirror, recorder)
        link.entering({"w": START}, state)
        link.step({"w": START - 1})
        link.optimizer.state[link.parameters["w"]]["0.mu.w"].zero_()

        assert torch.equal(torch.zeros(2).double(), link.state(state)["0.mu.w"])
        assert torch.equal(
            START, link.state({"0.mu.w": START, "0.count": torch.tensor(9.0)})["0.mu.w"]
        )
