"""A deadline ends code that does not want to end, in any thread."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from equivcheck.deadline import Expired, _user_frames, deadline


def outcome(body, seconds, until=__file__):
    """Return what a body ends with in a thread of its own."""
    found = []

    def run():
        try:
            with deadline(seconds, until):
                body()
            found.append("ended")
        except Expired:
            found.append("expired")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    return found


def outcome_here(body, seconds, until):
    """Return what a body ends with in this thread."""
    try:
        with deadline(seconds, until):
            body()
    except Expired:
        return ["expired"]
    return ["ended"]


def endless():
    while True:
        time.sleep(0.01)


def swallowing():
    """Like a loop that catches everything, once."""
    try:
        endless()
    except BaseException:  # noqa: BLE001 - what is tested
        endless()


def stubborn():
    """Like a loop that catches everything, always."""
    while True:
        with contextlib.suppress(BaseException):
            endless()


@pytest.mark.parametrize("body", [endless, swallowing])
def test_a_deadline_reaches_other_threads(body):
    """Signals reach the main thread only; the exception is sent there."""

    assert outcome(body, 0.1) == ["expired"]


def test_all_frames_are_the_users_where_no_file_of_ours_called_them():
    """Innermost first, those of libraries left out."""
    frame = sys._getframe()
    named = [each.f_code.co_filename for each in _user_frames(frame, "not on the stack")]

    assert named[0] == __file__
    assert pytest.__file__ not in named


@pytest.mark.timeout(0)  # whose timer would be waiting
@pytest.mark.parametrize("body", [endless, swallowing])
def test_a_deadline_is_kept_where_no_other_timer_runs(body):
    """And none is left running."""

    def of_a_caller():
        with contextlib.ExitStack() as stack:
            stack.callback(body)

    assert outcome_here(of_a_caller, 0.1, contextlib.__file__) == ["expired"]
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("run", [outcome, outcome_here])
def test_what_clears_up_behind_the_users_code_is_not_disturbed(run):
    """It may take longer than the second after which code that swallows the exception gets it again."""
    cleared = queue.Queue()

    def body():
        with contextlib.ExitStack() as stack:
            stack.callback(cleared.put, "done")
            stack.callback(threading.Event().wait, 1.5)
            endless()

    assert run(body, 0.1, contextlib.__file__) == ["expired"]
    assert cleared.get(timeout=5) == "done"


def test_what_is_sent_while_the_block_ends_is_taken_there(monkeypatch):
    """The code ended in time; that the exception was already on its way is no fault of what follows."""

    class Late(threading.Event):
        def set(self):
            time.sleep(0.3)
            super().set()

    monkeypatch.setattr(threading, "Event", Late)

    assert outcome(lambda: None, 0.1) == ["ended"]


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_code_that_ends_in_time_is_left_alone(seconds):
    assert outcome(lambda: None, seconds) == ["ended"]


def test_no_thread_is_left_behind():
    before = threading.active_count()
    outcome(lambda: None, 20.0)

    assert before == threading.active_count()


STUBBORN = f"""
import contextlib, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_deadline import outcome_here, stubborn
def of_a_caller():
    with contextlib.ExitStack() as stack:
        stack.callback(stubborn)
assert outcome_here(of_a_caller, 0.1, contextlib.__file__) == ["expired"]
assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
"""


def test_a_loop_that_always_swallows_is_ended_too():
    """In a process of its own: CPython 3.11 goes on handling an exception that a trace function raised in a handler."""
    subprocess.run([sys.executable, "-c", STUBBORN], check=True, timeout=120)


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
