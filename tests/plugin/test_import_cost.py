"""What the plugin costs a run that does not use it: no torch, no other module of ours, some milliseconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROBE = """
import sys

def pytest_unconfigure(config):
    loaded = sorted({"torch", "numpy", "rich"} & set(sys.modules))
    print("loaded", loaded, "ours", sorted(n for n in sys.modules if n.startswith("equivcheck")))
"""


@pytest.mark.parametrize("arguments", [(), ("--collect-only",)], ids=["run", "collect-only"])
def test_an_unrelated_suite_loads_nothing(pytester, clean, arguments):
    """Of ours the plugin's own module alone; and nothing is printed."""
    pytester.makeconftest(PROBE)
    pytester.makepyfile("def test_it(): ...")
    found = pytester.runpytest_subprocess("-W", "error", "-p", "no:randomly", *arguments)

    assert found.ret == 0
    assert "loaded [] ours ['equivcheck', 'equivcheck.plugin']" in found.stdout.str()
    found.stdout.no_fnmatch_line("equivcheck: *")


def test_the_probe_can_fail(pytester, clean):
    """A suite that does import torch, and a check that does run, are seen by it."""
    pytester.makeconftest(PROBE)
    pytester.makepyfile("def test_it():\n    import torch, equivcheck.report.text")
    found = pytester.runpytest_subprocess("-p", "no:randomly")

    told = found.stdout.str().splitlines()[-1]
    assert told.startswith("loaded ['numpy'")
    assert "'equivcheck.report.text'" in told


COST = """
import time
import pytest
before = time.process_time()
{work}
import equivcheck.plugin
print(1000 * (time.process_time() - before))
"""


def milliseconds(work=""):
    """Return the CPU time of importing the plugin into a process that has pytest, the least of five."""
    command = [sys.executable, "-c", COST.format(work=work)]
    return min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    )


def test_it_takes_less_than_50_milliseconds():
    """CPU time, so that a busy machine does not matter."""

    assert milliseconds() < 50


def test_that_measurement_can_fail():
    """Had the plugin imported torch, it would have been seen."""

    assert milliseconds("import torch") > 50
