"""Start a command with the recorder attached, wait for it, and leave no process of it behind."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from equivcheck.attach.server import Server, serves
from equivcheck.attach.spec import Spec
from equivcheck.errors import UsageError

__all__ = ["Ended", "launch", "words_of"]

HOME = Path(__file__).parents[1]
INJECT = Path(__file__).with_name("inject")
# Between the polite signal and the one that cannot be ignored.
GRACE = 5.0
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
# Beyond this much output of a script only the end is read again.
TAIL = 1024 * 1024


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Exit code; negative for a signal.
        output: The end of what it wrote to stdout and stderr; empty where it wrote to ours.
        failures: Tracebacks of a recorder that could not be put in place.
        seconds: Wall time.
    """

    code: int
    output: str
    failures: list[str]
    seconds: float


def words_of(command: str) -> tuple[list[str], dict[str, str]]:
    """Return the words of a command line, and the variables that are set in front of it.

    Raises:
        UsageError: There is no command, a quote is open, or the program is not found.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"bad-command: {command!r}: {error}") from None
    variables = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if not words:
        raise UsageError(
            "no-command: the command line is empty", fix='--full "python train.py --batch-size 16"'
        )
    if shutil.which(words[0], path=variables.get("PATH")) is None:
        raise UsageError(
            f"no-such-program: {words[0]} is not found",
            where=command,
            expected="a program on PATH, or a path to one",
            fix=f'"{sys.executable} ..."' if words[0] in {"python", "python3"} else None,
        )
    return words, variables


def launch(
    words: list[str],
    spec: Spec,
    folder: Path,
    *,
    variables: dict[str, str] | None = None,
    inherit: bool = False,
    server: Server | None = None,
    timeout: float | None = None,
) -> Ended:
    """Run a command to its end with every Python process in it watched.

    Args:
        words: Program and arguments.
        spec: What is asked of the processes.
        folder: Where the specification and the output go; made here.
        variables: Set in the environment besides ours.
        inherit: Let the command use our stdin, stdout and stderr.
        server: Starts what it can start faster.
        timeout: Seconds after which it is ended.

    Raises:
        TimeoutError: The time is up; everything it started has been ended.
        UsageError: The program cannot be started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spec.json"
    spec.write(path)
    token = uuid.uuid4().hex
    given = {**os.environ, **(variables or {})}
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(INJECT), given.get("PYTHONPATH", "")]))
    given |= {"EQUIVCHECK_SPEC": str(path), "EQUIVCHECK_HOME": str(HOME), "EQUIVCHECK_RUN": token}
    log = folder / "output.txt"
    started = time.perf_counter()
    with _terminable():
        if server is not None and not inherit and serves(words, variables or {}):
            code = server.run(words, given, log, timeout)
        else:
            code = _run(words, given, log, token, inherit=inherit, timeout=timeout)
    failures = [each.read_text(encoding="utf-8") for each in sorted(folder.glob("failed-*.txt"))]
    return Ended(code, _tail(log), failures, time.perf_counter() - started)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a polite signal to us end what we started too: without a handler Python would be gone at once."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _run(
    words: list[str],
    given: dict[str, str],
    log: Path,
    token: str,
    *,
    inherit: bool,
    timeout: float | None,
) -> int:
    """Run a command as a process of its own and return its exit code."""
    with log.open("wb") as output:
        stream = None if inherit else output
        try:
            process = subprocess.Popen(  # noqa: S603 - the user's own command
                words,
                env=given,
                stdin=None if inherit else subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=not inherit,
            )
        except OSError as error:
            raise UsageError(f"cannot-start: {words[0]}: {error.strerror}") from None
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            _end(process, token)


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - TAIL, 0))
        return file.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes], token: str) -> None:
    """End what is left of a command: the program itself, and whatever it started that still runs."""
    if process.poll() is None:
        _signal([process.pid], signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    left = _descendants(token)
    if process.poll() is None:
        left.append(process.pid)
    if not left:
        return
    _signal(left, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and (_descendants(token) or process.poll() is None):
        time.sleep(0.05)
    left = _descendants(token)
    if process.poll() is None:
        left.append(process.pid)
    _signal(left, signal.SIGKILL)
    process.wait()


def _signal(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _descendants(token: str) -> list[int]:
    """Return the processes that carry a run's token in their environment: its own, whatever session they are in."""
    found = []
    mark = f"EQUIVCHECK_RUN={token}".encode()
    for each in Path("/proc").glob("[0-9]*"):
        try:
            if int(each.name) == os.getpid() or mark not in (each / "environ").read_bytes():
                continue
            if (each / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(each.name))
        except (OSError, ValueError):
            continue
    return found
