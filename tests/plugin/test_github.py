"""In a workflow: one annotation for each cause, at the loop, and a step summary with every case."""

from __future__ import annotations

import pytest

SOURCE = """
import pytest

@pytest.mark.parametrize("k", [2, 4, 8])
def test_bad(equivcheck, k):
    equivcheck('EQ101.py', accumulation_steps=k)

def test_other(equivcheck):
    equivcheck('EQ306.py', accumulation_steps=2)

def test_good(equivcheck):
    equivcheck('good.py', accumulation_steps=2)

def test_measured(equivcheck):
    equivcheck.measure('EQ103.py', accumulation_steps=2)
"""


@pytest.fixture
def workflow(pytester, clean, monkeypatch):
    """Set what GitHub sets, and return the file of the step summary."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(pytester.path / "summary.md"))
    (pytester.path / "train_step.py").write_text("", encoding="utf-8")
    return pytester.path / "summary.md"


def test_each_cause_is_annotated_once(stubbed, workflow):
    """Three parametrized tests with one fault in one loop are one annotation; a passing test has none."""
    found = stubbed(SOURCE)
    told = [line for line in found.stdout.lines if line.startswith("::error")]

    assert [line.split("title=")[1][:5] for line in told] == ["EQ101", "EQ306"]
    assert all("file=train_step.py,line=3," in line for line in told)
    assert workflow.read_text(encoding="utf-8").count("divergent") >= 5


def test_the_setting_switches_it_off(stubbed, workflow, pytester):
    """`github = "off"` in the file, as on the command line."""
    pytester.makepyprojecttoml("[tool.equivcheck]\ngithub = 'off'\n")
    found = stubbed(SOURCE)

    found.stdout.no_fnmatch_line("::error*")
    assert not workflow.exists()


def test_outside_of_a_workflow_there_is_none(stubbed):
    """Nobody wants commands in a terminal."""
    stubbed(SOURCE).stdout.no_fnmatch_line("::error*")
