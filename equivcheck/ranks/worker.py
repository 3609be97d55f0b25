"""A rank process: joins the group, runs what it is sent, answers where it stands, and ends with `os._exit`.

Two threads: the main one runs the user's loop; the other one listens to the parent, so that a rank that hangs in a
collective still answers, and ends when the parent is gone.
"""

from __future__ import annotations

import gc
import os
import queue
import sys
import threading
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.execute import Run, execute
from equivcheck.ranks import group, wire
from equivcheck.ranks.status import RETURNED, RUNNING, Board, Standing
from equivcheck.subject import Subject
from equivcheck.usercode import is_library, warnings_in_place

if TYPE_CHECKING:
    from equivcheck.case import Case
    from equivcheck.observe import Observer
    from equivcheck.recording import Recording


@dataclass(frozen=True)
class Setup:
    """What a rank is told once.

    Attributes:
        folder: Where board, arena and rendezvous lie.
        rank: r.
        world_size: R.
        environment: Variables of the launcher.
        search_path: `sys.path` of the parent.
        cwd: Its working folder.
        device: "cpu" or "cuda".
        slot: Place on the board: the rank on this machine.
        store: Address, port and prefix of the store in which the ranks meet; None for a file in the folder.
    """

    folder: str
    rank: int
    world_size: int
    environment: dict[str, str]
    search_path: list[str]
    cwd: str
    device: str
    slot: int
    store: tuple[str, int, str] | None = None


@dataclass(frozen=True)
class Failure:
    """Why a rank could not finish a run.

    Attributes:
        message, where, because, fix, expected, user_traceback: As in EquivcheckError.
        at: When, as of `time.time_ns`.
        kind: Class name of what was raised.
        ours: It is a fault of this package.
        usage: The call or the target is wrong.
    """

    message: str
    user_traceback: str
    at: int
    kind: str
    where: str = ""
    because: str | None = None
    fix: str | None = None
    expected: str | None = None
    ours: bool = False
    usage: bool = False


def main(connection: Connection, setup: Setup) -> None:
    """Serve runs until the parent is gone."""
    code = 1
    try:
        _Worker(connection, setup).serve()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing may escape into multiprocessing's own exit
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Worker:
    def __init__(self, connection: Connection, setup: Setup) -> None:
        self._connection = connection
        self._setup = setup
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        folder = Path(setup.folder)
        self._board = Board(folder / "board")
        self._mapped: wire.Mapped | None = None
        self._events = 0
        self._number = 0
        self._main = threading.get_ident()
        self._fetches: dict[int, int] = {}

    def serve(self) -> None:
        """Set this process up, join the group, and run what comes."""
        setup = self._setup
        with suppress(OSError):
            os.setsid()  # What the user's code starts (loaders' workers) ends with this rank.
        os.dup2(2, 1)  # The result is written to stdout, by the parent alone.
        os.environ.update(setup.environment)
        sys.path[:] = setup.search_path
        os.chdir(setup.cwd)
        torch.set_num_threads(1)
        if setup.rank:
            warnings.simplefilter("ignore")  # Rank 0 says it once.
        threading.Thread(target=self._listen, daemon=True).start()
        if setup.device == "cuda":
            torch.cuda.set_device(int(setup.environment["LOCAL_RANK"]) % torch.cuda.device_count())
        store = (
            group.meet(Path(setup.folder), setup.world_size)
            if setup.store is None
            else group.meet_at(*setup.store)
        )
        group.join(setup.rank, setup.world_size, setup.device, store)
        gc.freeze()  # What is loaded now stays: collecting later looks at the runs' own objects only.
        self._send(("ready", 0, None))
        with warnings_in_place():
            self._run_what_comes()

    def _run_what_comes(self) -> None:
        subject: Subject | None = None
        while True:
            message = self._inbox.get()
            kind, number, *content = wire.loads(message, self._mapped)
            if kind == "subject":
                subject, arena, place = content
                self._mapped = wire.Mapped(Path(self._setup.folder) / arena)
                if place is not None:
                    sys.path[:] = place[0]
                    os.chdir(place[1])
                continue
            assert subject is not None
            self._number = number
            self._run(subject, *content)
            gc.collect()

    def _listen(self) -> None:
        """Hear the parent: runs are queued, questions are answered at once."""
        while True:
            try:
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                os._exit(1)
            if message == b"where":
                self._send(("where", self._number, (self._stack(), self._issued())))
            else:
                self._inbox.put(message)

    def _send(self, value: Any) -> None:
        message = wire.dumps(value)
        with self._lock, suppress(BrokenPipeError):
            self._connection.send_bytes(message)

    def _stack(self) -> list[str]:
        """Return the user's frames of the running loop, innermost first, as `file:line in function`."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        found = []
        while frame is not None:
            filename = frame.f_code.co_filename
            if not is_library(filename):
                found.append(f"{filename}:{frame.f_lineno} in {frame.f_code.co_name}")
            frame = frame.f_back
        return found

    @staticmethod
    def _issued() -> int:
        try:
            return group.issued()
        except RuntimeError:
            return 0

    def _run(self, subject: Subject, case: Case, runs: list[Run], observer: Observer) -> None:
        run = runs[self._setup.rank]
        started = time.time_ns()
        self._events += 1
        self._board.write(self._setup.slot, Standing(0, -1, 0, self._events, self._number, RUNNING))
        try:
            recording = execute(subject, case, run, observer, watch=self._watch)
            self._stand(RETURNED, recording)
            recording.collectives = group.flight(started)
            gathered = [each.gathered() for each in run.interventions]
            traffic = group.issued(), group.count()
            self._send(("done", self._number, (recording, gathered, traffic)))
        except EquivcheckError as error:
            self._send(("failed", self._number, _failure(error)))
        except Exception as error:  # noqa: BLE001 - it is a fault of ours and must be told
            self._send(("failed", self._number, _crash(error)))

    def _watch(self, recording: Recording) -> None:
        self._stand(RUNNING, recording)

    def _stand(self, state: int, recording: Recording) -> None:
        self._events += 1
        step = len(recording.steps)
        since = len(recording.fetched) - self._fetched_before(recording, step)
        standing = Standing(
            step, since - 1, len(recording.backwards), self._events, self._number, state
        )
        self._board.write(self._setup.slot, standing)

    def _fetched_before(self, recording: Recording, step: int) -> int:
        """Return the micro-batches that had been fetched when the last optimizer step began."""
        if not step:
            self._fetches = {}
        elif step not in self._fetches:
            self._fetches[step] = len(recording.fetched)
        return self._fetches.get(step, 0)


def _failure(error: EquivcheckError) -> Failure:
    cause = error.__cause__
    return Failure(
        message=error.message,
        where=error.where or "",
        because=error.because,
        fix=error.fix,
        expected=error.expected,
        user_traceback=error.user_traceback,
        at=time.time_ns(),
        kind=type(cause if cause is not None else error).__name__,
        usage=isinstance(error, UsageError),
    )


def _crash(error: Exception) -> Failure:
    return Failure(
        message=f"{type(error).__name__}: {error}",
        user_traceback="".join(traceback.format_exception(error)),
        at=time.time_ns(),
        kind=type(error).__name__,
        ours=True,
    )
