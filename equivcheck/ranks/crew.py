"""The ranks of one case, as their parent sees them: start, run, watch, end.

One set of processes serves every run of a case, each of which executes the user's code anew, and the cases after it. A
run in which a rank fails ends all of them; the next run starts others.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

from equivcheck.errors import StepError, TimedOut, UsageError
from equivcheck.ranks import team
from equivcheck.ranks.status import RETURNED, Standing
from equivcheck.ranks.team import Rank, Team

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
# With something put right: after so many seconds, or so many times what the longest run has taken.
TRIAL_STALLED: Final = 5.0
TRIAL_FACTOR: Final = 10.0
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
class Crew:
    """The ranks of one case, started when they are first needed.

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
    _team: Team | None = None
    _longest: float = 0.0

    def start(self) -> None:
        """Start the processes, without waiting for them, or take some that another case has left."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"no-gpu: --device cuda for {self.world_size} ranks, and 0 CUDA devices here",
                expected="a GPU for each rank, or at least one for all",
                fix="--device cpu",
            )
        if self._team is None:
            self._team = team.taken(self.world_size, self.device)
            self._team.take_up(self.subject)

    @property
    def _ranks(self) -> list[Rank]:
        assert self._team is not None
        return self._team.ranks

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
        assert self._team is not None
        try:
            begun = time.monotonic()
            self._team.send(case, list(runs), observer)
            self._wait(runs[0].role, self._patience(runs[0]))
            self._longest = max(self._longest, time.monotonic() - begun)
        except BaseException:
            self._end()
            raise
        finished = [each.done for each in self._ranks if each.done is not None]
        return [recording for recording, _ in finished], [gathered for _, gathered in finished]

    # ---- waiting -------------------------------------------------------------------------------

    def _patience(self, run: Run) -> float:
        """Return for how long no rank may compute anything.

        What is put right may let ranks wait for each other for ever, where the loop as written has long ended.
        """
        if not run.interventions or not self._longest:
            return STALLED
        return min(STALLED, max(TRIAL_STALLED, TRIAL_FACTOR * self._longest))

    def _wait(self, role: str, patience: float) -> None:
        assert self._team is not None
        limit = None
        if self.ends_at is not None:
            left = max(self.ends_at - time.monotonic(), 0.1)
            limit = time.monotonic() + left - min(TO_TELL[0] * left, TO_TELL[1])
        quiet_since, last = time.monotonic(), self._team.activity()
        while any(each.done is None for each in self._ranks):
            left = 1.0 if limit is None else min(1.0, limit - time.monotonic())
            if left <= 0:
                raise self._late(role, self.timeout or 0.0)
            self._team.hear(left)
            if any(each.failure is not None or each.died is not None for each in self._ranks):
                raise self._failed(role)
            now = self._team.activity()
            if now != last:
                quiet_since, last = time.monotonic(), now
            if time.monotonic() - quiet_since > (patience if self._all_ready() else _START):
                raise self._late(role, time.monotonic() - quiet_since, stalled=True)

    def _all_ready(self) -> bool:
        return all(each.ready for each in self._ranks)

    # ---- what went wrong -----------------------------------------------------------------------

    def _standing(self, rank: int) -> Standing:
        return self._ranks[rank].link.standing()

    def _place(self, role: str, rank: int) -> str:
        standing = self._standing(rank)
        if self._team is None or standing.run != self._team.number:
            return f"{role}, rank {rank}, before build()"
        return (
            f"{role}, rank {rank}, optimizer_step {standing.optimizer_step}, "
            f"micro_step {max(standing.micro_step, 0)}"
        )

    def _failed(self, role: str) -> Exception:
        assert self._team is not None
        until = time.monotonic() + GRACE
        while (left := until - time.monotonic()) > 0 and any(
            each.failure is None and each.died is None and each.done is None for each in self._ranks
        ):
            self._team.hear(left)
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
        if isinstance(error, StepError):
            error.optimizer_step = self._standing(rank).optimizer_step
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
        how, fix = f"ended with exit code {code}", None
        because: str | None = None
        if self._ranks[rank].link.lost:
            how, because = "has gone", "the process that its launcher started, or its machine, has"
        elif code < 0:
            how = f"was killed by signal {-code} ({_signal_name(-code)})"
        else:
            because = "the loop, or a library in it, ends its own process, as os._exit() does"
            fix = "return from train on every rank"
        if code == -signal.SIGKILL:
            because = "killed from outside, or by the system for lack of memory"
        return StepError(
            f"rank-died: rank {rank} {how}",
            where=self._place(role, rank),
            expected="every rank to return from train",
            because="; ".join(part for part in (because, stopped) if part) or None,
            fix=fix,
        )

    def _late(self, role: str, seconds: float, *, stalled: bool = False) -> TimedOut:
        """Say which rank the others were waiting for, and where each stands."""
        for each in self._ranks:
            if each.done is None and each.died is None:
                each.link.send(b"where")
        assert self._team is not None
        until = time.monotonic() + TO_TELL[1] / 3
        while (left := until - time.monotonic()) > 0 and any(
            each.answer is None and each.done is None and each.died is None for each in self._ranks
        ):
            self._team.hear(left)
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
        """Let go of the ranks: the next case may have them, if there is one and they are sound."""
        if self._team is not None:
            found, self._team = self._team, None
            team.given_back(found)

    def _end(self) -> None:
        """End every rank, with what it has started."""
        if self._team is not None:
            found, self._team = self._team, None
            found.close()


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
