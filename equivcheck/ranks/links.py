"""How a parent reaches one rank: what it says, how far it got, and whether it lives.

A rank is a process of this machine's fork server, or one that a launcher's process on some machine keeps (`hosts`).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import connection as connections
from pathlib import Path
from typing import Any, Protocol

from equivcheck.ranks import server, worker
from equivcheck.ranks.status import Board, Standing
from equivcheck.ranks.worker import Setup


class Link(Protocol):
    """The way to one rank.

    Attributes:
        exit_code: How its process ended, once all that it said was heard; None while it lives.
        lost: There is no way to it any more, nor to whoever kept it.
    """

    exit_code: int | None
    lost: bool

    def send(self, message: bytes) -> None:
        """Send a message; a rank that has gone already does not hear it."""

    def share(self, path: Path) -> None:
        """Let the rank read what an arena's file holds by now."""

    def objects(self) -> list[Any]:
        """Return what can be waited for: something is heard then."""

    def messages(self) -> Iterator[bytes]:
        """Yield what has arrived, without waiting for more."""

    def standing(self) -> Standing:
        """Return where the rank stands."""

    def processor_time(self) -> int:
        """Return the processor time that it has used, in ticks."""

    def end(self) -> None:
        """End the rank, with what it has started; do not wait for it."""

    def close(self) -> None:
        """Let go of the rank, once it has ended."""


class Local:
    """A rank in a process of this machine.

    Args:
        setup: What it is told once.
        board: Where it writes how far it got.
    """

    def __init__(self, setup: Setup, board: Board) -> None:
        self.exit_code: int | None = None
        self.lost = False
        self._board, self._slot = board, setup.slot
        self._connection, theirs = connections.Pipe()
        self.process = server.start(worker.main, theirs, setup)
        theirs.close()

    def send(self, message: bytes) -> None:
        """Send a message; a rank that has gone already does not hear it."""
        with suppress(BrokenPipeError, ConnectionError):
            self._connection.send_bytes(message)

    def share(self, path: Path) -> None:
        """Do nothing: the rank reads the same file."""

    def objects(self) -> list[Any]:
        """Return its pipe, and what tells the end of its process."""
        return [self._connection, self.process.sentinel]

    def messages(self) -> Iterator[bytes]:
        """Yield what has arrived; then note the end of its process, if it has ended."""
        ended = self.process.exitcode is not None
        while self._connection.poll():  # What it said last counts.
            try:
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                self.process.join(1.0)
                code = self.process.exitcode
                self.exit_code = code if code is not None else -1
                return
            yield message
        if ended:
            self.exit_code = self.process.exitcode

    def standing(self) -> Standing:
        """Return where the rank stands."""
        return self._board.read(self._slot)

    def processor_time(self) -> int:
        """Return the processor time that it has used, in ticks; 0 where that is not known."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
            fields = stat.rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])
        except (OSError, IndexError, ValueError):
            return 0

    def end(self) -> None:
        """Kill the rank and the processes of its session."""
        pid = self.process.pid
        if pid is None:
            return
        lives = self.process.exitcode is None
        # Where the rank itself is gone, what it started may still be there, in a group that has its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        if lives:
            with suppress(ProcessLookupError):
                self.process.kill()

    def close(self) -> None:
        """Wait for the end of the rank, and close the pipe."""
        self.process.join(5.0)
        self._connection.close()
