"""The plugin on the engine, each time in a process of its own: torch is loaded there, and warnings are errors."""

from __future__ import annotations

import json

CLOSURES = """
import pytest
import train_step as step


def test_good(equivcheck):
    equivcheck(step, accumulation_steps=2)


@pytest.mark.parametrize("k", [2, 4])
def test_bad(equivcheck, k):
    def train(model, loader, accumulation_steps):
        step.train(model, loader, accumulation_steps, divide=False)

    equivcheck(step, train=train, accumulation_steps=k)


def test_file(equivcheck):
    before = step.build
    equivcheck("train_step.py", accumulation_steps=2)
    import train_step
    assert train_step is step and train_step.build is before


def test_expected(equivcheck):
    equivcheck(step, train=step.undivided, accumulation_steps=2, expect=["EQ101"])


def test_measured(equivcheck):
    result = equivcheck.measure(step, train=step.undivided, accumulation_steps=4)
    assert result.worst.scale == pytest.approx(4)
"""


def found_in(path):
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    return [(case["test"], case["id"], case["verdict"], case["outcome"]) for case in cases]


def test_alone_and_on_two_workers_the_outcome_is_the_same(real, pytester):
    """The same cases, verdicts and ids in the same order, and one report by the controller."""
    alone = real(CLOSURES, "--equivcheck-json=a.json", "--equivcheck-html=a.html", "--tb=short")
    shared = real("", "-n2", "--equivcheck-json=b.json", "--equivcheck-html=b.html", "--tb=short")

    for found in (alone, shared):
        found.assert_outcomes(passed=4, failed=2)
        found.stdout.fnmatch_lines(
            [
                "E   equivcheck.DivergenceError: EQ101 missing-division: ?x the full_batch gradient (acc*",
                "EQ101 missing-division: 2 cases in 2 tests",
                "replay    pytest 'test_step.py::test_bad*' --equivcheck-replay *",
                "report    ?.json",
                "report    ?.html",
            ]
        )
        assert found.stdout.str().count("EQ101 missing-division: 2 cases") == 1
    assert found_in(pytester.path / "a.json") == found_in(pytester.path / "b.json")


def test_without_a_terminal(real, pytester):
    """Reports are written all the same."""
    found = real(CLOSURES, "-p", "no:terminal", "--equivcheck-json=r.json")

    assert found.ret == 1
    assert len(found_in(pytester.path / "r.json")) == 6
