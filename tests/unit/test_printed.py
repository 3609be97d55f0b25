"""Losses are read from what scripts print, in the styles that people print them in."""

from __future__ import annotations

import pytest

from equivcheck.recording import Recording
from equivcheck.scripts.printed import Number, differing, losses_of


def values(text):
    return {name: [each.value for each in found] for name, found in losses_of(text).items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("iter 0: loss 2.3026, time 5.00ms, mfu 3.10%", {"loss": [2.3026]}),
        ("Train Epoch: 1 [0/60000 (0%)]\tLoss: 2.300039", {"loss": [2.300039]}),
        ("{'loss': 4.16, 'grad_norm': 1.07, 'epoch': 0.5}", {"loss": [4.16]}),
        ("{'train/loss': '4.16'}", {"train/loss": [4.16]}),
        ("Train: 0 [3/14] Loss: 1.61 (1.58) LR: 1.0e-03", {"loss": [1.61]}),
        ("step=3 train_loss=1.5e-01 val_loss=2", {"train_loss": [0.15], "val_loss": [2.0]}),
        ("loss -0.25", {"loss": [-0.25]}),
        ("loss_scale 65536.0 loss 1.25", {"loss": [1.25]}),
        ("no loss here: 3", {}),
        ("lossless 3/4", {}),
        ("loss 3/10", {}),
    ],
)
def test_a_printed_loss_is_read(text, expected):
    assert expected == values(text)


def test_the_last_digit_is_known():
    assert losses_of("loss 0.250 loss 2.5e-03") == {
        "loss": [Number(0.25, 1e-3), Number(2.5e-3, 1e-4)]
    }


def series(*values, unit=1e-4):
    return {"loss": [Number(value, unit) for value in values]}


@pytest.mark.parametrize(
    ("mine", "exact", "rule"),
    [
        ((0.5001, 0.4), True, "divided by accumulation_steps once too often"),
        ((8.0016, 6.4), True, "summed, not averaged"),
        ((2.1, 1.4), False, None),
    ],
)
def test_only_exact_multiples_are_wrong_beyond_doubt(mine, exact, rule):
    found = differing(series(2.0004, 1.6), series(*mine), Recording("candidate"), 2, 4)

    assert found is not None
    assert (found["exact"], found.get("rule")) == (exact, rule)


@pytest.mark.parametrize(
    ("full", "accumulated", "steps"),
    [
        (series(2.0, 1.6), series(2.0, 1.6), 2),
        (series(2.0, 1.6), series(2.00005, 1.60005), 2),
        (series(2.0, 1.6), series(0.5, 0.4), 3),
        (series(2.0, 1.6), series(0.5, 0.4, 0.3), 2),
        (series(2.0), {}, 1),
    ],
    ids=["same", "rounded", "not per step", "more often", "absent"],
)
def test_what_agrees_or_is_not_printed_per_step_says_nothing(full, accumulated, steps):
    assert differing(full, accumulated, Recording("candidate"), steps, 4) is None


def test_a_multiple_of_few_digits_proves_nothing():
    """0.4 and 0.1 with one digit each may be a quarter by chance."""
    found = differing(series(0.4, unit=0.1), series(0.1, unit=0.1), Recording("candidate"), 1, 4)

    assert found is not None
    assert not found["exact"]
