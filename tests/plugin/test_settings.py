"""[tool.equivcheck] and the variables: the same table as the command line's."""

from __future__ import annotations

import pytest

TEST = "def test_it(equivcheck):\n    equivcheck('good.py')\n"


def test_the_file_sets_what_no_test_says(stubbed, pytester, ran):
    """Found from the root of the session."""
    pytester.makepyprojecttoml("[tool.equivcheck]\naccumulation_steps = [3]\nsplit = 'uneven'\n")
    stubbed(TEST).assert_outcomes(passed=1)

    assert [(c.accumulation_steps, c.split) for c in ran] == [(3, "uneven")]


def test_a_variable_is_over_the_file(stubbed, pytester, ran, monkeypatch):
    """As on the command line."""
    pytester.makepyprojecttoml("[tool.equivcheck]\naccumulation_steps = [3]\n")
    monkeypatch.setenv("EQUIVCHECK_ACCUMULATION_STEPS", "5")
    stubbed(TEST)

    assert [case.accumulation_steps for case in ran] == [5]


def test_a_mistake_in_the_file_is_a_usage_error(stubbed, pytester, ran):
    """With section, key and the closest one; but only where a check is asked for."""
    pytester.makepyprojecttoml("[tool.equivcheck]\naccumulation_step = [3]\n")
    found = stubbed(TEST)

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(
        ["*unknown setting accumulation_step*", "*did you mean accumulation_steps?"]
    )
    assert ran == []


def test_a_mistake_does_not_disturb_who_does_not_check(stubbed, pytester):
    """A run that does not use the plugin does not read its settings."""
    pytester.makepyprojecttoml("[tool.equivcheck]\naccumulation_step = [3]\n")

    stubbed("def test_it(): ...\n").assert_outcomes(passed=1)


def test_reports_may_be_named_in_the_file(stubbed, pytester):
    """`html` and `json` mean the same there; the options are over them."""
    pytester.makepyprojecttoml("[tool.equivcheck]\nhtml = 'a.html'\njson = 'a.json'\n")
    stubbed(TEST, "--equivcheck-json=b.json")

    assert sorted(path.name for path in pytester.path.glob("?.*")) == ["a.html", "b.json"]
