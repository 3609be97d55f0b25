"""Parameters where the loop leaves them: compared when the next step begins, and at the end of the run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name

from equivcheck.case import Case
from equivcheck.differences import Sums
from equivcheck.errors import UsageError
from equivcheck.settled import judged_as_left
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment
from equivcheck.verdict import Finding, Judgement


class Loop:
    """Two optimizers that step behind the same backwards.

    Args:
        factor: Of the loss when accumulated.
    """

    def __init__(self, factor=1.0):
        self.factor = factor

    def build(self):
        return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(3)]

    def train(self, model, loader, accumulation_steps):
        optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[0], model[2])]
        factor = self.factor if accumulation_steps > 1 else 1.0
        for index, (x, y) in enumerate(loader, 1):
            (F.cross_entropy(model(x), y) * factor / accumulation_steps).backward()
            if index % accumulation_steps == 0:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()


AT_THE_STEP = Finding("gradients", 0, 0, ("w",), 1.0, 0.0)
ELSEWHERE = Finding("logged", 0, 0, (), 1.0, 0.0)


@pytest.fixture
def run():
    """Return a function that runs a loop, and returns what a judgement becomes by where it leaves its parameters."""

    def judged(loop):
        experiment = SubjectExperiment(load_subject(loop), Case("Loop", 2))
        experiment.fit()
        left = experiment.settled()
        before = Judgement([AT_THE_STEP, ELSEWHERE])
        noise = experiment.noise()
        return left, before, judged_as_left(before, experiment.reference(), left, noise)

    yield judged
    torch.set_default_dtype(torch.float32)


def test_what_steps_show_counts_for_nothing_where_parameters_agree_afterwards(run):
    left, _, after = run(Loop())

    # Behind the last optimizer that steps at a place, and of all parameters.
    assert [len(step.parameters) for step in left.steps] == [0, 4] * 3
    assert after.findings == [ELSEWHERE]
    assert after.left is left
    assert 1.0 < after.margin


def test_parameters_that_differ_leave_the_judgement_as_it_was(run):
    left, before, after = run(Loop(1.0 + 2.0**-10))

    assert left.steps[-1].parameters
    assert after is before


def test_a_step_that_the_full_batch_has_not_leaves_the_judgement_as_it_was(run):
    left, before, _ = run(Loop())
    left.steps[0].matched = None

    assert judged_as_left(before, None, left, None) is before


def test_a_parameter_that_is_not_finite_leaves_the_judgement_as_it_was(run, monkeypatch):
    monkeypatch.setattr("equivcheck.settled.update_limit", lambda *_: math.inf)
    left, before, _ = run(Loop())
    left.steps[-1].parameters["0.weight"] = Sums(1.0, math.nan, math.nan, 1, finite=False)

    assert judged_as_left(before, None, left, None) is before


def test_a_run_whose_last_step_was_not_looked_at_leaves_the_judgement_as_it_was(run):
    left, before, _ = run(Loop())
    left.steps.clear()

    assert judged_as_left(before, None, left, None) is before


def test_a_run_that_cannot_be_left_to_itself_is_judged_at_its_steps(monkeypatch):
    """Where ranks send each other something behind a step, it is asked for."""
    experiment = SubjectExperiment(load_subject(Loop(1.5)), Case("Loop", 2))
    try:
        experiment.fit()
        monkeypatch.setattr("equivcheck.experiment.sends_after_steps", lambda _: True)

        def refused(_=()):
            raise UsageError("no")

        monkeypatch.setattr(experiment, "settled", refused)
        judgement = experiment.judgement()
    finally:
        torch.set_default_dtype(torch.float32)

    assert "gradients" in judgement.kinds()
    assert judgement.left is None
