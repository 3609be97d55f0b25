"""What an experiment refuses, and what it makes of loops that give it less than others do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from equivcheck.case import Case
from equivcheck.decide import plan_cases, run_case
from equivcheck.errors import UsageError
from equivcheck.experiment import Experiment
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment


class Loop:
    """A subject of full batches of 6 rows.

    Args:
        steps_every: Full batches to an optimizer step.
        factor: Of the loss when accumulated.
        alone: Whether it runs with one micro-batch at a time.
    """

    def __init__(self, steps_every=1, factor=1.0, *, alone=True):
        self.steps_every = steps_every
        self.factor = factor
        self.alone = alone

    def build(self):
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 1))

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(6, 4, generator=generator) for _ in range(3)]

    def train(self, model, loader, accumulation_steps):
        assert self.alone or accumulation_steps > 1 or len(loader) == 3
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        every = accumulation_steps * self.steps_every
        for index, x in enumerate(loader):
            factor = self.factor if accumulation_steps > 1 else 1.0
            (factor * model(x).square().mean() / every).backward()
            if (index + 1) % every == 0:
                optimizer.step()
                optimizer.zero_grad()


class Stated(Loop):
    """States its objective, which runs the normalization in training mode."""

    def objective(self, model, batch):
        model.train()
        loss = model(batch).square().mean()
        model.eval()
        return loss


class Framework(Loop):
    """Batches by itself."""

    def train(self, model, dataset, micro_batch_size, accumulation_steps):
        raise AssertionError


class Batching(Loop):
    """Batches the whole set of samples by itself, in order.

    Args:
        loss: Of what the model gives for a micro-batch.
    """

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def train(self, model, dataset, micro_batch_size, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for index, rows in enumerate(DataLoader(dataset, micro_batch_size)):
            self.loss(model(rows), accumulation_steps).backward()
            if (index + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (lambda out, k: out.square().mean() / k, []),
        (lambda out, _: out.square().mean(), ["EQ101 proved"]),
        (lambda out, k: out.std() / k, ["EQ202 proved"]),
    ],
    ids=["right", "not divided", "coupled"],
)
def test_pieces_of_a_framework_are_found_by_the_samples_that_it_took(loss, told):
    """No run can be given one micro-batch of a set that the code batches itself; all of them, each with a step."""
    case = run_case(load_subject(Batching(loss)), Case("Batching", 2))

    assert [f"{each['code']} {each['status']}" for each in case["causes"]] == told


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"accumulation_steps": 2, "split": "uneven"}, "uneven-split"),
        ({"accumulation_steps": 4}, "indivisible-batch"),
    ],
    ids=["uneven", "indivisible"],
)
def test_a_framework_gets_slices_of_one_size(fields, told):
    with pytest.raises(UsageError, match=told):
        SubjectExperiment(load_subject(Framework()), Case("Framework", **fields))


def test_an_objective_leaves_the_buffers_as_they_were():
    lab = SubjectExperiment(load_subject(Stated()), Case("Stated", 2))

    assert lab.reference().steps[0].objective is not None
    assert lab.judgement().same


def test_an_objective_of_one_batch_says_nothing_of_a_step_over_two():
    lab = SubjectExperiment(load_subject(Stated(steps_every=2)), Case("Stated", 2))

    assert [step.objective for step in lab.reference().steps] == [None]


def test_samples_that_no_step_consumed_are_no_pieces():
    """The last of three full batches, where the loop steps after every second one."""
    lab = SubjectExperiment(load_subject(Loop(steps_every=2)), Case("Loop", 2))

    assert [each.pieces.shape[0] for each in lab.attributions()] in ([2], [])
    assert lab.judgement().same


def test_a_close_call_without_single_micro_batches_is_decided_with_a_note():
    """A difference so small that other permutations are asked, and the pieces cannot be."""
    lab = Loop(factor=1.0 + 2.0**-20, alone=False)
    case = run_case(load_subject(lab), Case("Loop", 2))

    assert case["verdict"] == "divergent"
    assert any("could not be run alone" in note for note in case["notes"])


class Roles(Experiment):
    """A kind of experiment that can make the runs of the roles and no others, as two recordings can."""


Roles.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (lambda lab: lab.at(3), "with K = 3"),
        (lambda lab: lab.candidate_again(), "once more"),
        (lambda lab: lab.reseeded_within(), "with other seeds in its steps alone"),
        (lambda lab: lab.contributed(), "with what each backward adds, 0 things put right"),
        (lambda lab: lab.contributed_whole(), "with what each backward of the full batch adds"),
        (lambda lab: lab.turned(2), "with the micro-batches of every cycle turned by 2"),
        (lambda lab: lab.copies_moved(), "left to itself"),
        (lambda lab: lab.left_by_backward(), "with what each cycle's last backward leaves"),
        (lambda lab: lab.left_on_ranks(), "with what each rank leaves, 0 things put right"),
        (lambda lab: lab.settled(), "left to itself, 0 things put right"),
        (lambda lab: lab.left_by_full_batch(), "with what the full batch leaves"),
        (lambda lab: lab.alone_of_length(8), "with a loader of 8 micro-batches"),
        (lambda lab: lab.full_batch_alone(1), "with full batch 1 alone"),
        (lambda lab: lab.begun_with(3), "that begins with micro-batch 3"),
    ],
)
def test_a_run_that_cannot_be_made_is_refused_by_what_it_would_be(run, told):
    """Detectors do without it: a kind of experiment need not know all that they may ask for."""
    lab = Roles(load_subject(Loop()), Case("Loop", 2))

    with pytest.raises(UsageError, match=f"this run cannot be made: {told}"):
        run(lab)


def test_what_a_kind_of_experiment_does_not_know_is_left_open():
    lab = Roles(load_subject(Loop()), Case("Loop", 2))

    assert lab.estimate()["bytes"] == 0
    assert lab.facts() == {}
    assert lab.other_samples() is None
    assert lab.printed() is None


def test_what_a_framework_cannot_be_given_is_refused_before_anything_runs():
    """A cut of several sizes is an error; a default K that leaves a remainder is left out, with a note."""
    subject = load_subject(Framework())

    with pytest.raises(UsageError, match="uneven-split"):
        plan_cases(subject, [2, 4], explicit=False, split="uneven")
    cases, notes = plan_cases(subject, [2, 4], explicit=False)

    assert [each.accumulation_steps for each in cases] == [2]
    assert [note.partition(":")[0] for note in notes] == ["accumulation_steps 4 left out"]
