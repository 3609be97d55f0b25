"""What a check leaves behind in the process that asked for it: nothing."""

from __future__ import annotations

import random
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import equivcheck
from equivcheck.case import Case
from equivcheck.deadline import deadline
from equivcheck.entropy import OtherSeeds, seed_torch, watch_entropy
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment

MUTANT = Path(__file__).parents[2] / "fixtures/mutants/eq311_accumulation_squared.py"

SUBJECT = """
import numpy as np
import torch

WEIGHTS = torch.tensor(np.random.randn(4))
torch.set_default_dtype(torch.float64)


def build():
    return torch.nn.Linear(4, 1)


def batches():
    return [torch.tensor(np.random.randn(8, 4)) for _ in range(2)]


def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        ((model(x * WEIGHTS) ** 2).mean() / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "draws_at_import.py"
    path.write_text(SUBJECT, encoding="utf-8")
    return str(path)


def test_random_states_and_the_default_dtype_are_put_back(target):
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)
    first = (torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: NPY002, S311
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    random.seed(7)

    result = equivcheck.measure(target, accumulation_steps=2)

    assert result.verdict == "equivalent"
    assert torch.get_default_dtype() is torch.float32
    assert first == (torch.rand(2).tolist(), np.random.rand(), random.random())  # noqa: NPY002, S311


def test_batches_drawn_with_numpy_are_the_same_each_time(target):
    subject, case = load_subject(target), Case(target, 2)
    try:
        one, two = SubjectExperiment(subject, case), SubjectExperiment(subject, case)

        assert all(map(torch.equal, one.data.batches, two.data.batches))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "watched", [lambda: watch_entropy(lambda: None), lambda: OtherSeeds(1).opened()]
)
def test_generators_made_before_are_still_of_their_class(watched):
    """scikit-learn's `check_random_state` asks `isinstance`."""
    before = np.random.RandomState(0)
    original = random.Random
    with watched():

        class Own(random.Random):
            def __init__(self, seed, name):
                super().__init__(seed)
                self.name = name

        assert isinstance(before, np.random.RandomState)
        assert isinstance(np.random.RandomState(0), np.random.RandomState)
        assert isinstance(torch.default_generator, torch.Generator)
        assert issubclass(original, random.Random)
        assert Own(1, "mine").name == "mine"
        assert not isinstance(random.Random(1), Own)  # noqa: S311
    assert random.Random is original


def test_an_outer_timer_goes_on():
    """pytest-timeout's is such a timer."""
    before = signal.getsignal(signal.SIGALRM)
    left, interval = signal.setitimer(signal.ITIMER_REAL, 100)
    try:
        with deadline(5, __file__):
            pass

        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_missing_step_is_made_whatever_lies_in_memory():
    """Lazy objects must not be woken: torch.distributed's deprecated ones warn when they are looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = equivcheck.measure(str(MUTANT), accumulation_steps=2)

    assert [cause["code"] for cause in result.cases[0]["causes"]] == ["EQ311"]


def test_seeding_draws_what_torch_draws():
    """The same numbers as after `torch.manual_seed`, for any seed."""
    for seed in (0, 1, 2**40 + 3):
        torch.manual_seed(seed)
        expected = torch.randn(5)
        seed_torch(seed)
        assert torch.equal(torch.randn(5), expected)
