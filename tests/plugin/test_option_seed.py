"""--equivcheck-seed N: the seed of every check that does not state its own."""

from __future__ import annotations

import pytest

SOURCE = """
def test_it(equivcheck):
    equivcheck('good.py', accumulation_steps=2)
    equivcheck('good.py', accumulation_steps=2, seed=3)
"""


def test_it_is_over_the_file_and_under_the_test(stubbed, pytester, ran):
    """What a test states is part of the test."""
    pytester.makepyprojecttoml("[tool.equivcheck]\nseed = 5\n")
    stubbed(SOURCE)
    stubbed("", "--equivcheck-seed=7")

    assert [case.seed for case in ran] == [5, 3, 7, 3]


@pytest.mark.parametrize("value", ["-1", "x", "1.5"])
def test_a_wrong_value_is_a_usage_error(stubbed, ran, value):
    """Before anything runs."""
    found = stubbed(SOURCE, f"--equivcheck-seed={value}")

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([f"*'{value}' is no whole number of at least 0*"])
    assert ran == []
