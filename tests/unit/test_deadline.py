"""A deadline ends code that does not want to end, in any thread."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equivcheck.deadline import Expired, deadline


def outcome(body, seconds):
    """Return what a body ends with in a thread of its own."""
    found = []

    def run():
        try:
            with deadline(seconds, __file__):
                body()
            found.append("ended")
        except Expired:
            found.append("expired")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    return found


def endless():
    while True:
        time.sleep(0.01)


def swallowing():
    """Like a loop that catches everything, once."""
    try:
        endless()
    except BaseException:  # noqa: BLE001 - what is tested
        endless()


@pytest.mark.parametrize("body", [endless, swallowing])
def test_a_deadline_reaches_other_threads(body):
    """Signals reach the main thread only; the exception is sent there."""

    assert outcome(body, 0.1) == ["expired"]


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_code_that_ends_in_time_is_left_alone(seconds):
    assert outcome(lambda: None, seconds) == ["ended"]


def test_no_thread_is_left_behind():
    before = threading.active_count()
    outcome(lambda: None, 20.0)

    assert before == threading.active_count()


TRACED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_deadline import endless, outcome
assert outcome(endless, 0.1) == ["expired"]
assert outcome(lambda: None, 20.0) == ["ended"]
sys.settrace(lambda *_: None)
outcome(lambda: None, None)
"""


def test_a_debugger_goes_on_afterwards():
    """The interpreter is left without anything pending: CPython 3.11 spins for ever where a traced call meets it."""
    subprocess.run([sys.executable, "-c", TRACED], check=True, timeout=120)
