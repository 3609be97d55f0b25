"""A planted fault fails the suites that it concerns; `make planted` checks all of them, these are a few."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from equivcheck.api import outcomes, plan
from equivcheck.config import OPTIONS
from equivcheck.suite import expanded

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("planted", ROOT / "tests" / "bench" / "planted.py")
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)

# One row for each way in which a fault can matter, or not.
ROWS: Mapping[str, tuple[str, ...]] = {
    "suite:clipping": ("norm_active", "norm_inactive"),
    "suite:loss_normalization": ("tokens", "mean", "sum"),
    "suite:schedulers": ("exponential",),
    "suite:normalization": ("batch_norm_2d",),
}


def jobs(fault, targets=("suite:all",)):
    values: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()}
    values["train"] = planted.trainer(fault)
    return plan(targets, values, explicit=False)[0]


@pytest.mark.parametrize("fault", planted.FAULTS)
def test_it_fails_where_it_matters(fault):
    """And nowhere else: the right loop nowhere at all."""
    chosen = [
        job
        for job in jobs(fault, ROWS)
        if (job.case.accumulation_steps, job.case.split) == (2, "even")
        and job.case.workload in ROWS[job.case.target]
    ]
    cases = list(outcomes(chosen))

    assert len(cases) == sum(map(len, ROWS.values()))
    assert planted.disagreements(fault, cases) == []
    failed = {case["target"] for case in cases if not case["theory"]["met"]}
    assert (
        failed
        == {
            "right": set(),
            "no_division": set(ROWS),
            "mean_of_means": {"suite:loss_normalization"},
            "clip": {"suite:clipping"},
            "schedule": {"suite:schedulers"},
        }[fault]
    )


def test_what_has_to_fail_is_told_apart():
    """The prediction is neither always yes nor always no."""
    cases = [
        {**job.case.as_dict(), "theory": job.theory}
        for job in jobs("right", ["suite:tail", "suite:clipping"])
    ]
    for fault in ("mean_of_means", "clip"):
        predicted = {planted.has_to_fail(fault, case) for case in cases}

        assert {True, False} <= predicted


def test_the_page_is_of_these_suites():
    """Each suite that a trainer can be put under is in the table, and the right loop fails in none."""
    page = planted.PAGE.read_text(encoding="utf-8")
    told = re.findall(r"^\| (suite:\w+) \| (-|\d+) of", page, re.MULTILINE)

    assert {name for name, _ in told} == set(expanded("suite:all"))
    assert {failed for _, failed in told} == {"-"}
