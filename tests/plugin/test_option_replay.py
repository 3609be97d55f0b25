"""--equivcheck-replay CASE_ID: one case again, and no other test."""

from __future__ import annotations

import json

import pytest

SOURCE = """
def test_good(equivcheck):
    equivcheck('good.py')

def test_bad(equivcheck):
    equivcheck('{bad}.py')

def test_other():
    pass
"""


@pytest.fixture
def recorded(stubbed, pytester):
    """Run once and return the ids of the cases of `test_bad`."""
    stubbed(SOURCE.format(bad="EQ101"), "--equivcheck-json=r.json")
    cases = json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))["cases"]
    return [case["id"] for case in cases if case["test"].endswith("test_bad")]


def test_only_the_recorded_case_runs(stubbed, recorded, ran):
    """The beginning of an id is enough, and all other tests are deselected."""
    ran.clear()
    found = stubbed("", f"--equivcheck-replay={recorded[1][:6]}")

    found.assert_outcomes(failed=1, deselected=2)
    assert [case.id for case in ran] == [recorded[1]]
    found.stdout.fnmatch_lines([f"STILL DIVERGENT  {recorded[1]}  (was divergent)"])


def test_a_case_that_nobody_recorded_is_looked_for(stubbed, recorded, ran):
    """Ids are the same everywhere, so one from another machine is found by its test."""
    ran.clear()
    found = stubbed("", f"--equivcheck-replay={recorded[0]}", "--cache-clear")

    found.assert_outcomes(failed=1, skipped=1, deselected=1)
    assert [case.id for case in ran] == [recorded[0]]
    found.stdout.fnmatch_lines([f"DIVERGENT  {recorded[0]}"])


def test_a_case_that_does_not_exist_fails_the_run(stubbed, recorded):
    """Nothing was compared."""
    found = stubbed("", "--equivcheck-replay=ffffffffff")

    assert found.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    found.stdout.fnmatch_lines(["no case ffffffffff in the tests that ran"])


def test_the_failure_prints_the_command(stubbed):
    """To be pasted: the test and the case."""
    found = stubbed(SOURCE.format(bad="EQ101"))

    found.stdout.re_match_lines(
        [r"replay    pytest \S+::test_bad --equivcheck-replay [0-9a-f]{10}"]
    )
