"""Code under test may end Python: a process that only waits lives on, and has the run go on where it ended.

The command runs in a child, made before anything is loaded. It says through a pipe when a case is finished, and when
all is: a child that ends without having said so was ended by the code that it ran, or from outside.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from equivcheck.errors import StepError, how_ended

GUARDED: Final = ("run", "replay")
_FINISHED, _CASE = b"f", b"c"
# Deaths without a finished case between them: one may have come from outside; code that ends Python in a case is told
# as that case's error after the second; a third is of no case.
_DEATHS: Final = 3
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

_pipe: int | None = None


def guards(arguments: Sequence[str]) -> bool:
    """Return whether a command is to run in a child: it runs the user's code, and no launcher has started it."""
    return (
        bool(arguments)
        and arguments[0] in GUARDED
        and hasattr(os, "fork")
        and hasattr(signal, "sigwaitinfo")
        and "RANK" not in os.environ
    )


def case_finished() -> None:
    """Tell the process that waits that a case is finished, so that the run gets on."""
    _say(_CASE)


def _say(what: bytes) -> None:
    if _pipe is not None:
        os.write(_pipe, what)


def guarded(command: Callable[[str], int], *, goes_on: bool) -> int:
    """Run a command in a child and return its exit code.

    Args:
        command: Told how the process that ran it before ended; empty for the first. Returns the exit code.
        goes_on: A command that is run again takes up what was finished.

    Raises:
        StepError: The process ended, and going on did not help.
    """
    how, deaths = "", 0
    while True:
        child = _start(command, how)
        if isinstance(child, int):
            return child
        ended = child.wait()
        if ended.finished or ended.asked:
            return ended.code
        how, deaths = ended.how, 1 if ended.cases else deaths + 1
        if not goes_on or deaths == _DEATHS:
            times = "" if deaths == 1 else f", {deaths} times without a finished case between"
            raise StepError(
                f"process-ended: the process ended with {how}{times}",
                because="the code under test ends Python (os._exit, a crash in compiled code), or something "
                "ended it from outside",
                fix="no os._exit in the code under test; of a crash the stack is printed",
            )


@dataclass(frozen=True)
class _Ended:
    """How a child ended.

    Attributes:
        status: As `os.waitpid` gives it.
        said: What it wrote.
        asked: The signal that this process was ended with, which it has passed on; 0 for none.
    """

    status: int
    said: bytes
    asked: int

    @property
    def finished(self) -> bool:
        return _FINISHED in self.said

    @property
    def cases(self) -> int:
        return self.said.count(_CASE)

    @property
    def code(self) -> int:
        """The exit code, as it was said: what happens to an interpreter that is shut down is no result."""
        if self.finished:
            return self.said[self.said.index(_FINISHED) + 1]
        return 128 + self.asked

    @property
    def how(self) -> str:
        return how_ended(os.waitstatus_to_exitcode(self.status))


@dataclass(frozen=True)
class _Child:
    pid: int
    pipe: int
    mask: set[int | signal.Signals]

    def wait(self) -> _Ended:
        """Wait for its end; what is sent to this process alone is passed on to it."""
        asked = 0
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            got = signal.sigwaitinfo({signal.SIGCHLD, *_SIGNALS})
            if got.si_signo == signal.SIGCHLD:
                continue
            asked = got.si_signo
            # A terminal's Ctrl-C, which the kernel sends, goes to both.
            if got.si_code <= 0:
                os.kill(self.pid, asked)
        said = b""
        while part := os.read(self.pipe, 4096):
            said += part
        os.close(self.pipe)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)
        return _Ended(status, said, asked)


def _start(command: Callable[[str], int], how: str) -> _Child | int:
    """Return the child; in the child itself, the exit code of the command."""
    global _pipe  # noqa: PLW0603 - a process is a child once
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *_SIGNALS})
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        return _Child(pid, reading, mask)
    os.close(reading)
    _die_with(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    _pipe = writing
    faulthandler.enable()
    code = command(how)
    _say(_FINISHED + bytes([code]))
    return code


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent is killed: nothing runs on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
