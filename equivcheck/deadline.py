"""A deadline for code that does not want to end: a loop without one, or one that swallows every exception."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from equivcheck.usercode import is_library


def _user_frames(frame: FrameType | None, until: str) -> Iterator[FrameType]:
    """Yield the running frames of the user's code, innermost first, up to a file of ours."""
    while frame is not None:
        if not is_library(frame.f_code.co_filename):
            yield frame
        if frame.f_code.co_filename == until:
            return
        frame = frame.f_back


class Expired(BaseException):
    """The deadline passed. Not an Exception, so that a loop that catches those cannot swallow it."""


@contextmanager
def deadline(seconds: float | None, until: str) -> Iterator[None]:
    """Raise Expired in the block once the time has passed, in whatever the user's code does.

    Args:
        seconds: None for no deadline.
        until: The file that calls: frames above it are not the code under test.

    Notes:
        Outside of the main thread, which signals do not reach, a call into C (a long sleep) is not cut short: the
        exception waits for the next line of Python.
    """
    if not seconds:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        with _from_another_thread(seconds, until):
            yield
        return

    fired = 0

    def expire(_signal: int, frame: FrameType | None) -> None:
        nonlocal fired
        fired += 1
        inside = list(_user_frames(frame, until))
        # Once it has left the user's code, nothing may disturb the clearing up.
        if fired > 1 and not inside:
            return
        if fired > 1:
            # A bare `except:` in the loop has swallowed the last one; its own body is not protected by it.
            for each in inside:
                each.f_trace = again
            sys.settrace(lambda *_: None)
        raise Expired

    # Nothing traces what traces: no coverage of it can be measured.
    def again(_frame: FrameType, event: str, _argument: object) -> Any:  # pragma: no cover
        if event == "line":
            raise Expired
        return again

    tracer = sys.gettrace()
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if left:  # A timer of whoever called us, pytest-timeout's say, goes on.
            left = max(left - (time.monotonic() - began), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
        sys.settrace(tracer)


@contextmanager
def _from_another_thread(seconds: float, until: str) -> Iterator[None]:
    """Raise Expired in this thread, from one that waits; again each second for a loop that swallows it."""
    watched, over = threading.get_ident(), threading.Event()

    def wait() -> None:
        again = False
        while not over.wait(1.0 if again else seconds):
            frame = sys._current_frames().get(watched)  # noqa: SLF001 - the only way to a thread's frames
            # Once it has left the user's code, nothing may disturb the clearing up.
            if not again or any(_user_frames(frame, until)):
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(watched), ctypes.py_object(Expired)
                )
            again = True

    watcher = threading.Thread(target=wait, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        # What was sent late arrives here, at the latest in join. Taking it back (SetAsyncExc with NULL) would leave the
        # interpreter's flag for it set for good, and CPython 3.11 then never ends under a debugger or coverage.
        try:
            over.set()
            watcher.join()
        except Expired:
            over.set()
            watcher.join()
