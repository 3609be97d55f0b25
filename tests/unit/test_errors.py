"""Errors print as blocks and carry the exit codes of the design."""

from __future__ import annotations

import pytest

from equivcheck import errors


def test_a_block_has_its_parts_in_order():
    """What happened, where, expected, because, fix; continuation lines are aligned."""
    error = errors.UsageError("seed is -1", fix="--seed 0", where="--seed", because="a\nb")

    assert str(error) == (
        "seed is -1\n  where     --seed\n  because   a\n            b\n  fix       --seed 0"
    )


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.UsageError, 2),
        (errors.TargetError, 2),
        (errors.StepError, 3),
        (errors.TimedOut, 3),
        (errors.InconclusiveError, 4),
        (errors.InternalError, 70),
    ],
)
def test_every_error_has_its_exit_code(kind, code):
    """Instances answer with the code that the command line returns."""

    assert kind("message").exit_code == code


def test_a_divergence_is_a_failed_assertion():
    """Test runners count it as a failure, not as an error."""

    assert issubclass(errors.DivergenceError, AssertionError)


@pytest.mark.parametrize(
    ("code", "told"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "SIGKILL"), (-120, "signal 120")],
)
def test_how_a_process_ended_is_told_by_name_where_a_signal_has_one(code, told):
    assert errors.how_ended(code) == told
