"""Run cases side by side in worker processes, each of which loads its target again by name.

Workers come from a fork server that has torch and the engine loaded. A case travels as plain data, so that nothing of
a parent's state, and no closure, gets into a worker; and what ends a worker costs the case it was at, no other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection as connections
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Final

from equivcheck.api import Job, finished, job_of, outcomes
from equivcheck.errors import EquivcheckError, UsageError, how_ended
from equivcheck.ranks import server

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# What a case's own deadline cannot end, because it never comes back to Python, is ended from outside so much later.
GRACE: Final = 10.0
_PRELOAD: Final = ("torch", "torch._dynamo", "equivcheck.decide", *server.PRELOAD)
_PARTS: Final = ("where", "expected", "because", "fix")


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    began: float = 0.0


def side_by_side(
    jobs: Sequence[Job],
    count: int,
    *,
    timeout: float | None = None,
    begun: Callable[[Job], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Run jobs in worker processes and yield the finished cases as they come.

    Args:
        jobs: With subjects that a target names.
        count: Workers.
        timeout: Longest time for one case in seconds.
        begun: Called with each job when it is handed to a worker.

    Raises:
        UsageError: A case cannot be run at all; the others are given up, as in one process.
    """
    waiting = deque(jobs)
    workers = [_started(timeout) for _ in range(min(count, len(jobs)))]
    try:
        for worker in workers:
            _hand_over(worker, waiting, begun)
        while busy := [each for each in workers if each.job is not None]:
            # The end of a process shows in its pipe as well.
            ready = connections.wait([each.pipe for each in busy], _patience(busy, timeout))
            for worker in busy:
                if worker.pipe in ready:
                    case = _received(worker)
                elif timeout and time.monotonic() - worker.began > timeout + GRACE:
                    case = _given_up(worker, timeout)
                else:
                    continue
                if worker.process.exitcode is not None:
                    workers[workers.index(worker)] = worker = _started(timeout)  # noqa: PLW2901 - its successor
                worker.job = None
                _hand_over(worker, waiting, begun)
                yield case
    finally:
        for worker in workers:
            _end(worker)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread meanwhile: on models of some thousand parameters more get in each other's way."""
    import torch  # noqa: PLC0415 - loaded to run only

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- the parent's side -------------------------------------------------------------------------


def _started(timeout: float | None) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    # No daemon: a worker may start ranks of its own.
    process = server.start(_work, theirs, timeout, preload=_PRELOAD, daemon=False)
    theirs.close()
    return _Worker(process, ours)


def _hand_over(worker: _Worker, waiting: deque[Job], begun: Callable[[Job], None]) -> None:
    if not waiting:
        return
    job = waiting.popleft()
    theory = None if job.theory is None else dict(job.theory)
    worker.job, worker.began = job, time.monotonic()
    begun(job)
    with suppress(OSError):  # A worker that is dead already shows when it is heard.
        worker.pipe.send({**job.case.as_dict(), "expect": list(job.expect), "theory": theory})


def _patience(busy: Sequence[_Worker], timeout: float | None) -> float | None:
    if not timeout:
        return None
    first = min(each.began for each in busy)
    return max(first + timeout + GRACE - time.monotonic(), 0.0) + 0.01


def _received(worker: _Worker) -> dict[str, Any]:
    """Return the case that a worker has finished, or the one that its end has cost."""
    try:
        kind, told = worker.pipe.recv()
    except (EOFError, OSError):
        return _died(worker)
    if kind == "refused":
        error = UsageError(told.pop("message"), **told)
        raise error
    return dict(told)


def _died(worker: _Worker) -> dict[str, Any]:
    worker.process.join()
    return _lost(
        worker,
        f"worker-died: {how_ended(worker.process.exitcode or 0)}",
        because="the process that ran this case was ended: by the system for want of memory, by a crash in "
        "compiled code, or because the code under test ends Python",
        fix="equivcheck replay runs it alone",
    )


def _given_up(worker: _Worker, timeout: float) -> dict[str, Any]:
    worker.process.kill()
    worker.process.join()
    return _lost(
        worker,
        f"timed-out: no verdict after {timeout:g} s",
        because="the code under test never came back to Python, so that its worker was killed",
        fix=f"--timeout {2 * timeout:g}",
    )


def _lost(worker: _Worker, message: str, **parts: str) -> dict[str, Any]:
    assert worker.job is not None
    error = {"type": "WorkerDied", "message": message, "where": None, "exit_code": 3, **parts}
    outcome = {"verdict": "error", "headline": message, "error": error}
    return finished(worker.job, {**outcome, "seconds": time.monotonic() - worker.began})


def _end(worker: _Worker) -> None:
    """End a worker by its own process id, whatever it is at."""
    worker.pipe.close()
    if worker.job is not None:
        worker.process.kill()
    worker.process.join(GRACE)
    if worker.process.exitcode is None:
        worker.process.kill()
        worker.process.join()


# ---- the worker's side -------------------------------------------------------------------------


def _work(pipe: Connection, timeout: float | None) -> None:
    """Run what comes through the pipe until nothing comes any more."""
    import torch  # noqa: PLC0415 - loaded in the fork server

    from equivcheck.ranks.team import kept  # noqa: PLC0415 - as above
    from equivcheck.usercode import warnings_in_place  # noqa: PLC0415 - as above

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the whole group; the parent ends us.
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    code = 0
    try:
        with kept(), warnings_in_place():
            while True:
                pipe.send(_answer(pipe.recv(), timeout))
    except (EOFError, OSError):
        pass
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # Process groups and threads of the code under test may hang at exit.


def _answer(case: Mapping[str, Any], timeout: float | None) -> tuple[str, dict[str, Any]]:
    try:
        job = job_of(case)
        [done] = outcomes([job], timeout=timeout)
    except EquivcheckError as error:
        return "refused", {name: getattr(error, name) for name in ("message", *_PARTS)}
    return "done", done


def _leave_with_parent() -> None:
    """End this process as soon as the one that asked for it has gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connections.wait([parent.sentinel])
    os._exit(1)
