"""Everything that can end a run, each with its exit code and the parts of a readable block.

A finding is data, never an exception inside the engine; `DivergenceError` exists only for the
functions that behave like an assertion.
"""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any, ClassVar


class EquivcheckError(Exception):
    """Base of all errors raised on purpose; prints as an aligned block.

    Args:
        message: What happened, with the value; complete in itself, at most 100 characters,
            since short summaries and annotations show nothing else.
        where: File and line, case, option or section.
        expected: What would have been right.
        because: The mechanism, in one sentence.
        fix: One line of code or one command to type next.

    Attributes:
        user_traceback: The user's own frames, where user code raised; else empty.
    """

    exit_code: ClassVar[int] = 70
    user_traceback: str = ""

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        because: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.because = because
        self.fix = fix

    def __str__(self) -> str:
        parts = (
            ("where", self.where),
            ("expected", self.expected),
            ("because", self.because),
            ("fix", self.fix),
        )
        lines = [self.message]
        for label, text in parts:
            if text:
                first, *rest = text.splitlines()
                lines.append(f"  {label:<9} {first}")
                lines += [" " * 12 + line for line in rest]
        return "\n".join(lines)


class UsageError(EquivcheckError):
    """The call, the configuration or a file handed in is wrong; nothing was run."""

    exit_code = 2


class TargetError(UsageError):
    """The target could not be found, imported, or lacks a part of the contract."""


class StepError(EquivcheckError):
    """The code under test raised, or a rank died.

    Args:
        message: As for every error; names the exception.
        user_traceback: The traceback with the user's own frames only.
        where: File and line of the user's innermost frame.
        expected: As for every error.
        because: As for every error.
        fix: As for every error.

    Attributes:
        optimizer_step: The one that the code was in when it raised; None where that is not known.
    """

    exit_code = 3
    optimizer_step: int | None = None

    def __init__(
        self,
        message: str,
        *,
        user_traceback: str = "",
        where: str | None = None,
        expected: str | None = None,
        because: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(message, where=where, expected=expected, because=because, fix=fix)
        self.user_traceback = user_traceback


class TimedOut(StepError):  # noqa: N818 - names what happened; it is not a fault of ours
    """The code under test did not finish within the time allowed."""


class InconclusiveError(EquivcheckError):
    """The experiment ran and cannot decide; the message names the source of the doubt."""

    exit_code = 4


class InternalError(EquivcheckError):
    """A fault of equivcheck itself."""

    exit_code = 70


class DivergenceError(AssertionError):
    """The update is not the full batch's; an AssertionError, so test runners call it a failure.

    Args:
        message: The report; its first line stands for it in short summaries.
        result: What was found, as data; None in an error that came from another process.
    """

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


# Tracebacks and short summaries name the public path, which is also the shorter one.
DivergenceError.__module__ = "equivcheck"


def how_ended(code: int) -> str:
    """Return how a process ended, by its exit code, which is negative where a signal ended it."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
