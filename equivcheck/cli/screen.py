"""Streams: results on stdout, everything else on stderr, colour only where it is wanted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, TextIO

from equivcheck.errors import EquivcheckError
from equivcheck.report import text


def colored(when: str, stream: TextIO) -> bool:
    """Return whether to colour: the flag decides, then NO_COLOR, FORCE_COLOR, then the stream."""
    if when != "auto":
        return when == "always"
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def error_block(error: EquivcheckError) -> None:
    """Print an error on stderr: its block, and the user's traceback if user code raised.

    Folded on a terminal only: what reads a pipe finds whole lines.
    """
    block = text.wrapped if sys.stderr.isatty() else text.printable
    print(block(f"error: {error}"), file=sys.stderr)
    if error.user_traceback:
        print("\n" + text.printable(error.user_traceback.rstrip()), file=sys.stderr)


@contextmanager
def own_stdout() -> Iterator[TextIO]:
    """Yield stdout for results alone; what user code prints meanwhile goes to stderr.

    The file descriptor is redirected too, for output of child processes and of C code.
    """
    sys.stdout.flush()
    try:
        real = sys.stdout.fileno() == 1
    except (OSError, ValueError):
        real = False
    if not real:  # a test or a notebook has replaced it
        kept = sys.stdout
        with redirect_stdout(sys.stderr):
            yield kept
        return
    saved = os.dup(1)
    try:
        with os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace") as out:
            os.dup2(2, 1)
            with redirect_stdout(sys.stderr):
                yield out
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def say(out: TextIO, message: str) -> None:
    """Print a line at once; a reader who has left does not cost the run its exit code."""
    try:
        print(message, file=out, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


_BAR = 20


class Progress:
    """One live line on a terminal's stderr, a bar and what runs; silent elsewhere.

    Args:
        total: Cases.
        done: Cases that were finished before.
        quiet: Show nothing.
    """

    def __init__(self, total: int, done: int = 0, *, quiet: bool) -> None:
        self._total, self._done = total, done
        self._failed = 0
        self._label = ""
        self._status: Any = None
        if sys.stderr.isatty() and not quiet and os.environ.get("TERM") != "dumb":
            from rich.console import Console  # noqa: PLC0415 - needed on a terminal only

            self._status = Console(file=sys.stderr, highlight=False).status("")

    def shown(self) -> AbstractContextManager[Any]:
        """Return a context in which the line is drawn."""
        return self._status if self._status is not None else nullcontext()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the line away while something else is printed on the same terminal."""
        if self._status is not None:
            self._status.stop()
        yield
        if self._status is not None:
            self._status.start()

    def begin(self, label: str) -> None:
        """Show the case that begins."""
        self._label = label
        self("")

    def end(self, *, failed: bool) -> None:
        """Count a finished case."""
        self._done += 1
        self._failed += failed

    def __call__(self, message: str) -> None:
        """Show what the current case is doing."""
        if self._status is not None:
            from rich.text import Text  # noqa: PLC0415 - as above

            self._status.update(Text(text.printable(self.line(message))))

    def line(self, message: str) -> str:
        """Return the line: bar, counts, case and role."""
        filled = _BAR * self._done // max(self._total, 1)
        failed = f"  {self._failed} failed" if self._failed else ""
        bar = "#" * filled + "-" * (_BAR - filled)
        return f"[{bar}] {self._done}/{self._total}{failed}  {self._label} {message}"[:78]
