"""Micro-batches that never reached a step, and copies of weights: what is proved of them, and what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from equivcheck import doubts
from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.detectors import clipped
from equivcheck.detectors.carried import Carried
from equivcheck.detectors.lost import _completed
from equivcheck.errors import UsageError
from equivcheck.interventions import Shrink
from equivcheck.recording import Recording, Step
from equivcheck.subject import load_subject

G = torch.tensor([3.0, 4.0], dtype=torch.float64)

SUBJECT = """
import itertools
import torch
from torch import nn
from torch.nn import functional as F

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(4)]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    copies = [p.detach().clone() for p in model.parameters()]
    index = 0
    iterator = iter(loader)
    while group := list(itertools.islice(iterator, accumulation_steps)):
        rows = sum(len(y) for _, y in group)
        for x, y in group:  # first sweep
            index += 1
            (F.cross_entropy(model(x), y, reduction="sum") / rows).backward()
        with torch.no_grad():
            ascents = [0.1 * p.grad for p in model.parameters()]
            for p, ascent in zip(model.parameters(), ascents):
                p.add_(ascent)
        optimizer.zero_grad()
        for x, y in group:  # second sweep
            (F.cross_entropy(model(x), y, reduction="sum") / rows).backward()
        with torch.no_grad():
            for p, ascent in zip(model.parameters(), ascents):
                p.sub_(ascent)
        optimizer.step()
        optimizer.zero_grad()
        if index:  # copies
            with torch.no_grad():
                for copy, p in zip(copies, model.parameters()):
                    copy.lerp_(p, 0.1)
"""
FIRST = "for x, y in group:  # first sweep"
SECOND = "for x, y in group:  # second sweep"
LAST = """(F.cross_entropy(model(x), y, reduction="sum") / rows).backward()
        with torch.no_grad():
            for p, ascent"""
COPIES = "if index:  # copies"
ALONE = "    index = 0\n"
TOLD = {
    "as it is": ("equivalent", ""),
    "the second sweep misses one": (
        "divergent",
        "EQ305 proved",
        (SECOND, "for x, y in group[:1]:"),
    ),
    "the second sweep misses one, and is not divided": (
        "divergent",
        "EQ305 suspected",
        (SECOND, "for x, y in group[:1]:"),
        (LAST, LAST.replace("/ rows", "/ len(y)")),
    ),
    "the first sweep misses one": ("divergent", "EQ305 proved", (FIRST, "for x, y in group[:1]:")),
    "copies by a count, with two backwards for each": (
        "divergent",
        "EQ309 suspected",
        (COPIES, "if index % 2 == 0:"),
    ),
    "copies by a count, micro-batches alone refused": (
        "divergent",
        "EQ309 suspected",
        (COPIES, "if index % 2 == 0:"),
        (ALONE, ALONE + "    assert accumulation_steps > 1 or len(loader) == 4\n"),
    ),
    "copies by what no count gives": (
        "divergent",
        "EQ309 suspected",
        (COPIES, "if accumulation_steps == 1 or index > 4:"),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_it_is_proved_what_a_step_never_got(tmp_path, name):
    """The codes, and whether they are proved."""
    verdict, expected, *replaced = TOLD[name]
    source = SUBJECT
    for line, other in replaced:
        assert line in source
        source = source.replace(line, other)
    path = tmp_path / "subject.py"
    path.write_text(source, encoding="utf-8")
    case = run_case(load_subject(str(path)), Case(str(path), 2))
    causes = [f"{each['code']} {each['status']}" for each in case["causes"]]

    assert case["verdict"] == verdict
    assert " ".join(causes) == expected


def test_a_short_sweep_with_parts_of_different_size_is_not_completed(tmp_path):
    """Nothing says how much of the others would go with them."""
    short = FIRST.replace("in group", "in group[:3]")
    summed = """index += 1
            (F.cross_entropy(model(x), y, reduction="sum") / rows"""
    assert FIRST in SUBJECT
    assert summed in SUBJECT
    twice = f"{summed} * (2 if len(group) > 1 and x is group[0][0] else 1)"
    source = SUBJECT.replace(FIRST, short).replace(summed, twice)
    path = tmp_path / "subject.py"
    path.write_text(source, encoding="utf-8")
    case = run_case(load_subject(str(path)), Case(str(path), 4))

    assert case["verdict"] == "divergent"
    assert "EQ305" not in [each["code"] for each in case["causes"] if each["status"] == "proved"]


def test_a_sweep_that_adds_nothing_makes_nothing():
    assert _completed(None, {}, {}, []) is None


def steps(*gradients):
    """Return a run of one optimizer with these gradients, one a step."""
    found = Recording("candidate")
    for index, gradient in enumerate(gradients):
        step = Step(index, "SGD", frozenset(), index + 1, index, [0.1], matched=index)
        step.sample = {"w": gradient}
        found.steps.append(step)
    return found


@pytest.mark.parametrize(
    ("as_written", "small", "is_changed"),
    [
        (steps(G), steps(G), False),
        (steps(G), steps(G * Shrink.FACTOR), False),
        (steps(G), steps(G * 1.5), True),
        (steps(G), steps(), False),
        (steps(G), steps(None), False),
    ],
    ids=["the same", "looked at before", "clipped", "a loop that stops", "a parameter unused"],
)
def test_gradients_that_are_others_when_they_are_small_are_clipped(as_written, small, is_changed):
    """What is not seen in both runs says nothing."""
    assert clipped._changed(as_written, small) is is_changed


@pytest.mark.parametrize("left", ["pieces", "a step"])
def test_nothing_is_known_to_be_carried_where_one_micro_batch_makes_no_step(left):
    """A loop that is given one micro-batch may return before its optimizer's first step."""
    pieces = torch.stack([G, 2 * G])
    alone = SimpleNamespace(matched=0, step=0, pieces=pieces, names=[("w", 2)])
    view = SimpleNamespace(
        chosen=(),
        candidate=steps(G),
        experiment=SimpleNamespace(
            attributions=lambda _: [alone] if left == "pieces" else [],
            begun_with=lambda _: [],
        ),
    )

    assert Carried.of(view) is None


def test_steps_are_taken_to_draw_where_they_cannot_be_seeded_by_themselves():
    """Two command lines: what they draw before their first micro-batch is theirs."""

    def refuse():
        raise UsageError("this run cannot be made")

    assert doubts.draws_within(SimpleNamespace(reseeded_within=refuse), None)


OTHER = torch.tensor([-4.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mine", "lacking", "share"),
    [
        (G, OTHER, 1.0),
        (2 * G, OTHER, 2.0),
        (G, torch.zeros_like(G), None),
        (-G, OTHER, None),
    ],
    ids=["as it is", "of another size", "what is lacking is not it", "against the gradient"],
)
def test_a_short_sweep_is_completed_by_what_it_lacks(mine, lacking, share):
    """The full batch's sweep gives the sum of two micro-batches; this one had the first of them."""
    noise = SimpleNamespace(floor=lambda: 1e-12, passed_on=lambda: 0.0)
    view = SimpleNamespace(experiment=SimpleNamespace(noise=lambda: noise))
    found = _completed(view, {"w": G + OTHER}, {"w": mine}, [{"w": lacking}])

    assert (found is None) is (share is None)
    if share is not None:
        assert torch.allclose(found["w"], share * lacking)
