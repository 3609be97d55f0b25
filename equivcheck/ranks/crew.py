"""The ranks of one case, as their parent sees them: start, run, watch, end.

One set of processes serves every run of a case, each of which executes the user's code anew. A run in which a rank
fails ends all of them; the next run starts others.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from equivcheck.errors import StepError, TimedOut, UsageError
from equivcheck.ranks import group, server, wire, worker
from equivcheck.ranks.status import RETURNED, Board, Standing
from equivcheck.ranks.worker import Failure, Setup

if TYPE_CHECKING:
    from equivcheck.case import Case
    from equivcheck.execute import Run
    from equivcheck.observe import Observer
    from equivcheck.recording import Recording
    from equivcheck.subject import Subject

# After the first failure others are heard for so long: a rank that was killed makes its peers raise at once.
GRACE: Final = 0.3
# Without a deadline, ranks that all wait are given up after so many seconds in which none of them computed anything.
STALLED: Final = 60.0
# Of the time that is left for a case, this share (and no more seconds) is kept to say which rank was waited for.
TO_TELL: Final = (0.3, 1.5)
_START: Final = 120.0
# What a rank's own collective raises when another rank has gone.
_OF_A_PEER: Final = (
    "Connection closed by peer",
    "Connection reset",
    "Broken pipe",
    "gloo",
    "Gloo",
    "NCCL",
)


@dataclass
class _Rank:
    process: ForkServerProcess
    connection: Connection
    failure: Failure | None = None
    died: int | None = None
    done: tuple[Recording, list[Any]] | None = None
    ready: bool = False
    answer: tuple[list[str], int] | None = None


@dataclass
class Crew:
    """R rank processes for one case, started when they are first needed.

    Attributes:
        subject: Code under test.
        world_size: R.
        device: "cpu" or "cuda".
        ends_at: `time.monotonic()` at which the case has to be decided; None for no deadline.
        timeout: The seconds that were allowed, for messages.
    """

    subject: Subject
    world_size: int
    device: str = "cpu"
    ends_at: float | None = None
    timeout: float | None = None
    _ranks: list[_Rank] = field(default_factory=list)
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _arena: wire.Arena | None = None
    _board: Board | None = None
    _number: int = 0

    def start(self) -> None:
        """Start the processes, without waiting for them."""
        if self._ranks:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="equivcheck-ranks-")
        folder = Path(self._folder.name)
        self._arena = wire.Arena(folder / "arena")
        self._board = Board(folder / "board", self.world_size)
        port = group.free_port()
        subject = wire.dumps(("subject", 0, self.subject))
        for rank in range(self.world_size):
            variables = group.environment(
                rank, self.world_size, rank, self.world_size, "127.0.0.1", port
            )
            if "GLOO_SOCKET_IFNAME" not in os.environ and sys.platform == "linux":
                variables["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of this machine's name
            setup = Setup(
                folder=str(folder),
                rank=rank,
                world_size=self.world_size,
                environment=variables,
                search_path=list(sys.path),
                cwd=str(Path.cwd()),
                device=self.device,
                slot=rank,
            )
            mine, theirs = connections.Pipe()
            process = server.start(worker.main, theirs, setup)
            theirs.close()
            mine.send_bytes(subject)
            self._ranks.append(_Rank(process, mine))

    def run(
        self, case: Case, runs: Sequence[Run], observer: Observer
    ) -> tuple[list[Recording], list[list[Any]]]:
        """Run the loop on every rank and return their recordings, and what interventions gathered.

        Args:
            case: The case.
            runs: One for each rank.
            observer: What each rank takes from its run.

        Raises:
            StepError: A rank raised, died or did not end in time; the message names it.
            UsageError: The call or the target is wrong.
        """
        self.start()
        assert self._arena is not None
        self._number += 1
        for each in self._ranks:
            each.done = each.failure = each.answer = None
        try:
            message = self._arena.dumps(("run", self._number, case, list(runs), observer))
            for each in self._ranks:
                with suppress(BrokenPipeError, ConnectionError):
                    each.connection.send_bytes(message)
            self._wait(runs[0].role)
        except BaseException:
            self.close()
            raise
        finished = [each.done for each in self._ranks if each.done is not None]
        return [recording for recording, _ in finished], [gathered for _, gathered in finished]

    # ---- waiting -------------------------------------------------------------------------------

    def _wait(self, role: str) -> None:
        limit = None
        if self.ends_at is not None:
            left = max(self.ends_at - time.monotonic(), 0.1)
            limit = time.monotonic() + left - min(TO_TELL[0] * left, TO_TELL[1])
        quiet_since, last = time.monotonic(), self._activity()
        while any(each.done is None for each in self._ranks):
            left = 1.0 if limit is None else min(1.0, limit - time.monotonic())
            if left <= 0:
                raise self._late(role, self.timeout or 0.0)
            self._hear(left)
            if any(each.failure is not None or each.died is not None for each in self._ranks):
                raise self._failed(role)
            now = self._activity()
            if now != last:
                quiet_since, last = time.monotonic(), now
            if time.monotonic() - quiet_since > (STALLED if self._all_ready() else _START):
                raise self._late(role, time.monotonic() - quiet_since, stalled=True)

    def _all_ready(self) -> bool:
        return all(each.ready for each in self._ranks)

    def _hear(self, seconds: float) -> None:
        """Take what ranks say within so many seconds; return after the first."""
        pending = [each for each in self._ranks if each.died is None]
        by_object: dict[Any, _Rank] = {each.connection: each for each in pending}
        by_object |= {each.process.sentinel: each for each in pending}
        for heard in connections.wait(list(by_object), seconds):
            each = by_object[heard]
            if heard is each.connection:
                self._take(each)
        for each in pending:
            if each.died is None and each.process.exitcode is not None:
                while each.connection.poll():  # What it said last counts.
                    if not self._take(each):
                        break
                each.died = each.process.exitcode

    def _take(self, rank: _Rank) -> bool:
        try:
            kind, number, content = wire.loads(rank.connection.recv_bytes())
        except (EOFError, OSError):
            if rank.died is None:
                rank.process.join(1.0)
                rank.died = rank.process.exitcode if rank.process.exitcode is not None else -1
            return False
        if kind == "ready":
            rank.ready = True
        elif number != self._number:
            return True
        elif kind == "where":
            rank.answer = content
        elif kind == "done":
            rank.done = content
        else:
            rank.failure = content
        return True

    def _activity(self) -> tuple[Any, ...]:
        """Return something that changes while any rank computes or gets on."""
        assert self._board is not None
        standings = [self._board.read(i).events for i in range(self.world_size)]
        times = [_processor_time(each.process.pid) for each in self._ranks]
        return (*standings, *times)

    # ---- what went wrong -----------------------------------------------------------------------

    def _standing(self, rank: int) -> Standing:
        assert self._board is not None
        return self._board.read(rank)

    def _place(self, role: str, rank: int) -> str:
        standing = self._standing(rank)
        if standing.run != self._number:
            return f"{role}, rank {rank}, before build()"
        return (
            f"{role}, rank {rank}, optimizer_step {standing.optimizer_step}, "
            f"micro_step {max(standing.micro_step, 0)}"
        )

    def _failed(self, role: str) -> Exception:
        until = time.monotonic() + GRACE
        while (left := until - time.monotonic()) > 0 and any(
            each.failure is None and each.died is None and each.done is None for each in self._ranks
        ):
            self._hear(left)
        rank = self._first()
        each = self._ranks[rank]
        others = [r for r in range(self.world_size) if r != rank]
        stopped = f"{_named(others)} stopped because rank {rank} failed" if others else None
        failure = each.failure
        if failure is None:
            return self._dead(role, rank, each.died or 0, stopped)
        if failure.ours:
            return RuntimeError(f"rank {rank}:\n{failure.user_traceback}")
        alike = [
            r
            for r, other in enumerate(self._ranks)
            if other.failure is not None and other.failure.message == failure.message
        ]
        if len(alike) == self.world_size > 1:
            stopped = f"all {self.world_size} ranks failed in the same way"
        because = "; ".join(part for part in (failure.because, stopped) if part) or None
        kind: type[StepError | UsageError] = UsageError if failure.usage else StepError
        error = kind(
            failure.message,
            where=failure.where,
            expected=failure.expected,
            because=because,
            fix=failure.fix,
        )
        error.user_traceback = failure.user_traceback
        return error

    def _first(self) -> int:
        """Return the rank that failed by itself: killed, or else the first to raise."""
        killed = [
            r
            for r, each in enumerate(self._ranks)
            if each.died is not None and each.failure is None
        ]
        raised = {r: each.failure for r, each in enumerate(self._ranks) if each.failure is not None}
        own = {
            r: failure
            for r, failure in raised.items()
            if not any(word in failure.message + failure.user_traceback for word in _OF_A_PEER)
        }
        if killed and not own:
            return killed[0]
        chosen = own or raised
        earliest = min(chosen.values(), key=lambda failure: failure.at)
        return min(r for r, failure in chosen.items() if failure.message == earliest.message)

    def _dead(self, role: str, rank: int, code: int, stopped: str | None) -> StepError:
        how = (
            f"was killed by signal {-code} ({_signal_name(-code)})"
            if code < 0
            else f"ended with exit code {code}"
        )
        because = (
            "killed from outside, or by the system for lack of memory"
            if code == -signal.SIGKILL
            else None
        )
        return StepError(
            f"rank-died: rank {rank} {how}",
            where=self._place(role, rank),
            expected="every rank to return from train",
            because="; ".join(part for part in (because, stopped) if part) or None,
        )

    def _late(self, role: str, seconds: float, *, stalled: bool = False) -> TimedOut:
        """Say which rank the others were waiting for, and where each stands."""
        for each in self._ranks:
            if each.done is None and each.died is None:
                with suppress(BrokenPipeError, OSError):
                    each.connection.send_bytes(b"where")
        until = time.monotonic() + TO_TELL[1] / 3
        while (left := until - time.monotonic()) > 0 and any(
            each.answer is None and each.done is None and each.died is None for each in self._ranks
        ):
            self._hear(left)
        rank, why = self._waited_for()
        lines = []
        for r, each in enumerate(self._ranks):
            standing = self._standing(r)
            if each.done is not None or standing.state == RETURNED:
                lines.append(
                    f"rank {r}: returned from train after {standing.optimizer_step} optimizer steps\n"
                )
            else:
                stack = each.answer[0] if each.answer is not None else []
                lines.append(
                    f"{self._place('rank', r).removeprefix('rank, ')}: {stack[0] if stack else 'no answer'}\n"
                )
        what = (
            f"no rank computed anything for {seconds:.0f} s"
            if stalled
            else f"no verdict after {seconds:g} s"
        )
        return TimedOut(
            f"timed-out: {what}, rank {rank} {why}",
            where=self._place(role, rank),
            user_traceback="".join(lines),
            expected="all ranks to issue the same collectives, and to end in time",
            because="the other ranks wait in a collective that this rank does not take part in",
            fix=f"--timeout {2 * (self.timeout or seconds):g}, if the case only needs longer",
        )

    def _waited_for(self) -> tuple[int, str]:
        """Return the rank that keeps the others waiting: the one with the fewest collectives."""
        returned = [
            r
            for r, each in enumerate(self._ranks)
            if each.done is not None or self._standing(r).state == RETURNED
        ]
        if returned and len(returned) < self.world_size:
            return returned[0], "has returned from train, and others have not"
        issued = {
            r: each.answer[1] for r, each in enumerate(self._ranks) if each.answer is not None
        }
        silent = [r for r in range(self.world_size) if r not in issued]
        if silent:
            return silent[0], "does not answer"
        rank = min(issued, key=lambda r: (issued[r], r))
        if len(set(issued.values())) == 1:
            # As many collectives everywhere: the one that is in none of them computes, or sleeps.
            steps = [self._standing(r) for r in range(self.world_size)]
            rank = min(range(self.world_size), key=lambda r: (steps[r].backwards, steps[r].events))
        return rank, f"is behind, with {issued[rank]} collectives issued"

    # ---- ending --------------------------------------------------------------------------------

    def close(self) -> None:
        """End every rank, with what it has started, and remove the files."""
        for each in self._ranks:
            _end(each.process)
        for each in self._ranks:
            each.process.join(5.0)
            each.connection.close()
        self._ranks = []
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _end(process: ForkServerProcess) -> None:
    """Kill a rank and the processes of its session."""
    pid = process.pid
    if pid is None:
        return
    if process.exitcode is None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            process.kill()
    else:
        # The rank itself is gone; what it started may still be there, in a group that has its number.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _named(ranks: Sequence[int]) -> str:
    """Return `rank 1`, `ranks 1-3` or `ranks 0 and 2-3`."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][-1] + 1:
            spans[-1].append(rank)
        else:
            spans.append([rank])
    shown = [f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans]
    return ("rank " if len(ranks) == 1 else "ranks ") + " and ".join(shown)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return "unknown"


def _processor_time(pid: int | None) -> int:
    """Return the processor time that a process has used, in ticks; 0 where that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])
    except (OSError, IndexError, ValueError):
        return 0
