"""Guard a plain training loop: the fixture, the marker, an expected cause, and any batch that hypothesis finds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import nn

import equivcheck as package
from equivcheck import strategies

spec = importlib.util.spec_from_file_location(
    "example_train_step", Path(__file__).with_name("train_step.py")
)
train_step = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_step)


def batches(rows=12):
    """Return two full batches of random rows."""
    return [{"x": torch.randn(rows, 8), "y": torch.randint(0, 4, (rows,))} for _ in range(2)]


def test_step_is_equivalent(equivcheck):
    equivcheck(train_step, batches=batches, accumulation_steps=4)


@pytest.mark.equivcheck(accumulation_steps=[2, 5], split=["even", "uneven"])
def test_odd_cuts_are_equivalent(equivcheck):
    equivcheck(train_step, batches=batches)


def test_batch_norm_is_the_only_difference(equivcheck):
    def build():
        return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))

    equivcheck(train_step, build=build, batches=batches, accumulation_steps=3, expect=["EQ201"])


def test_result_is_data(equivcheck):
    result = equivcheck.measure(train_step, batches=batches, accumulation_steps=2)

    assert result.worst.scale == pytest.approx(1.0)


@settings(max_examples=5, deadline=None)
@given(strategies.batches("classes", min_rows=3), strategies.splits())
def test_any_batch(drawn, split):
    def build():
        return nn.Linear(4, 5)

    package.check(
        build=build, batches=drawn, train=train_step.train, accumulation_steps=2, split=split
    )
