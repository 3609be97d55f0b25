"""The plugin on the engine, each time in a process of its own: torch is loaded there, and warnings are errors."""

from __future__ import annotations

import json

import pytest

BOTH = """
import pytest
import train_step as step


def test_good(equivcheck):
    equivcheck(step, accumulation_steps=2)


@pytest.mark.parametrize("k", [2, 4])
def test_bad(equivcheck, k):
    def train(model, loader, accumulation_steps):
        step.train(model, loader, accumulation_steps, divide=False)

    equivcheck(step, train=train, accumulation_steps=k)
"""
CLOSURES = f"""{BOTH}


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


@pytest.mark.slow
def test_shuffled_and_under_a_time_limit(real):
    """pytest-randomly reseeds and reorders, pytest-timeout sets an alarm of its own: neither changes an outcome."""
    for arguments in (("-p", "randomly", "--randomly-seed=3"), ("--timeout=120",)):
        real(CLOSURES, *arguments).assert_outcomes(passed=4, failed=2)


@pytest.mark.slow
def test_without_a_terminal(real, pytester):
    """Reports are written all the same, and a workflow's annotations are printed."""
    found = real(CLOSURES, "-p", "no:terminal", "--equivcheck-json=r.json")

    assert found.ret == 1
    assert len(found_in(pytester.path / "r.json")) == 6


@pytest.mark.slow
def test_in_a_workflow_each_cause_is_annotated_once(real, pytester, monkeypatch):
    """At the loop, however many parametrized tests it fails; and the step summary has a row for every case."""
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for arguments in ((), ("-p", "no:terminal")):
        found = real(BOTH, *arguments)
        told = [line for line in found.stdout.lines if line.startswith("::error")]

        assert len(told) == 1
        assert told[0].startswith("::error file=test_step.py,line=11,title=EQ101 missing-division")
    text = summary.read_text(encoding="utf-8")
    # Underscores would be emphasis in Markdown.
    assert text.count(r"test\_good") == 2
    assert text.count(r"test\_bad") == 4


@pytest.mark.parametrize(
    "arguments", [("-p", "no:equivcheck"), pytest.param((), marks=pytest.mark.slow)], ids=str
)
def test_a_plain_check_needs_no_plugin(real, arguments):
    """Inside @given, where a fixture would be refused; and with the plugin switched off."""
    source = """
    from hypothesis import given, settings
    import equivcheck
    import train_step as step
    from equivcheck import strategies

    @settings(max_examples=3, deadline=None, derandomize=True)
    @given(strategies.batches("values", min_rows=4, max_rows=4, tails=False))
    def test_any_batch(batches):
        equivcheck.check(step, batches=batches, accumulation_steps=2)
    """
    real(source, *arguments).assert_outcomes(passed=1)


def test_closures_run_on_several_processes(real):
    """Functions of a test travel to the ranks; the fixture passes the numbers on."""
    source = """
    from torch import nn
    import train_step as step

    def train(model, loader, accumulation_steps, world_size):
        model = nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
        step.train(model, loader, accumulation_steps)

    def test_it(equivcheck):
        def local(model, loader, accumulation_steps, world_size):
            train(model, loader, accumulation_steps, world_size)

        found = equivcheck(
            step, train=local, accumulation_steps=2, world_size=[1, 2], strategy="ddp"
        )
        assert [case["world_size"] for case in found.cases] == [1, 2]
    """
    real(source, "--equivcheck-max-ranks=2").assert_outcomes(passed=1)
