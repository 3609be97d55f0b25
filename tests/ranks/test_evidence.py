"""What a cause of several ranks says: which parameters, which cycles, which rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants" / "ranks"


@pytest.mark.parametrize(
    ("name", "told", "fix"),
    [
        ("eq502_one_parameter_ignored", {"parameters": "1 of 10"}, "reduce the gradients of all"),
        (
            "eq502_incomplete_cycle_not_reduced",
            {"cycles": "incomplete ones only"},
            "leave no_sync() where the step is taken",
        ),
        ("eq502_no_sync_to_the_end", {}, "leave no_sync() before the last"),
        (
            "eq502_parameters_averaged_after_adam",
            {},
            "reduce the gradients before optimizer.step()",
        ),
        ("eq109_reduced_again", {}, "reduce once, after the last backward"),
        ("eq508_reduced_where_all_have_it", {}, "DistributedDataParallel(model, find_unused"),
        (
            "eq305_skipped_on_one_rank",
            {"lost_micro_steps": ["0 of rank 1"]},
            "run backward for every micro-batch",
        ),
    ],
)
def test_a_cause_tells_where_it_is(name: str, told: dict[str, object], fix: str) -> None:
    """The place is in the evidence, and the fix is that of this place."""
    path = str(MUTANTS / f"{name}.py")
    case = Case(path, 2, world_size=2, strategy="ddp")

    [cause] = run_case(load_subject(path), case)["causes"]

    evidence = cause["evidence"]
    assert {key: evidence.get(key) for key in told} == told
    assert ("cycles" in evidence) == ("cycles" in told)
    assert cause["fix"].startswith(fix)


def test_parameters_averaged_after_the_step_are_judged_there() -> None:
    """What ranks do each for themselves is not shown as the difference; a note says what was compared."""
    path = str(MUTANTS.parents[1] / "trainers" / "ddp" / "parameters_averaged.py")

    result = run_case(load_subject(path), Case(path, 2, world_size=2, strategy="ddp"))

    assert result["headline"].startswith("the same update: parameters agree to ")
    assert result["divergence"]["gradients"] is None
    assert 0.0 < result["divergence"]["parameters"]["relative"] < 1e-12
    assert result["margin"] > 1.0
    assert [each["verdict"] for each in result["ranks"]] == ["equivalent"] * 2
    assert any("where the loop leaves them" in note for note in result["notes"])
