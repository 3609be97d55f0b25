"""Start scripts from a process that has torch loaded already: 0.1 s each instead of 3 s of imports.

Only `python FILE.py ...` under our own interpreter is started so; every other command line is a process of its own. The
child is what a new interpreter would be at the script's first line: its arguments, its folder first in the search path,
generators that nobody has seeded. What a script sets in its environment before it imports torch comes too late here,
in every role alike.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

__all__ = ["SHARED", "Server", "serves"]

# The search path that a script is to have is read before our own folder is put in it.
_START = (
    "import sys; path = sys.path[1:]; sys.path.insert(0, sys.argv[1]); "
    "from equivcheck.attach.server import serve; serve(path)"
)
# What scripts import in any case: optimizers load dynamo when they are first made.
_PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "torch.utils.data", "numpy")


def serves(words: list[str], variables: dict[str, str]) -> bool:
    """Return whether a command line is a file under our own interpreter, and nothing besides."""
    if variables or len(words) < 2 or words[1].startswith("-"):
        return False
    found = shutil.which(words[0])
    if found is None or not hasattr(os, "fork") or not Path(words[1]).is_file():
        return False
    theirs, ours = Path(found).absolute(), Path(sys.executable).absolute()
    # The same program under another name (python3), in the same environment.
    return theirs.parent == ours.parent and theirs.resolve() == ours.resolve()


class Server:
    """The process that forks, and the scripts that it has started; one at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, words: list[str], given: dict[str, str], log: Path, timeout: float | None) -> int:
        """Run a script to its end and return its exit code; negative for a signal.

        Raises:
            TimeoutError: The time is up; the script and its process group have been ended.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        request = {"words": words, "environment": given, "log": str(log), "cwd": str(Path.cwd())}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        pid = 0
        timer = None
        late = threading.Event()
        try:
            pid = int(self._line())
            if timeout is not None:

                def end() -> None:
                    late.set()
                    _end_group(pid)

                timer = threading.Timer(timeout, end)
                timer.daemon = True
                timer.start()
            code = int(self._line())
        except BaseException:
            # Interrupted: the script may still run, and the answer will never be asked for.
            if pid:
                _end_group(pid)
            self.close()
            raise
        finally:
            if timer is not None:
                timer.cancel()
        _end_group(pid)
        if late.is_set():
            raise TimeoutError
        return code

    def close(self) -> None:
        """End the process that forks."""
        process, self._process = self._process, None
        if process is None:
            return
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        process.kill()
        process.wait()

    def _line(self) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        found = self._process.stdout.readline()
        if not found:
            self.close()
            raise RuntimeError("the process that starts scripts has ended")
        return found

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
                [sys.executable, "-c", _START, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
        return self._process


# One for all runs of this process; it starts when it is first asked for a script.
SHARED = Server()
atexit.register(SHARED.close)


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


# ---- in the process that forks -----------------------------------------------------------------


def serve(path: list[str]) -> None:
    """Fork for every line that asks for it, and answer with the child's id and then its exit code.

    Args:
        path: The search path of a new interpreter, without a script's own folder.
    """
    for name in _PRELOADED:
        __import__(name)
    import equivcheck.attach.process  # noqa: F401, PLC0415 - loaded once for all children

    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            answers.close()
            _run(request, path)
        answers.write(b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        answers.write(b"%d\n" % os.waitstatus_to_exitcode(status))


def _run(request: dict[str, Any], path: list[str]) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["environment"])
        code = _script(request["words"], path)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def _script(words: list[str], path: list[str]) -> int:
    """Run a script as `__main__` and return the exit code that Python would end with."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    from equivcheck.attach.process import attach  # noqa: PLC0415

    torch.seed()
    np.random.seed(None)  # noqa: NPY002 - what user code draws from
    random.seed()
    sys.argv = list(words[1:])
    sys.orig_argv[:] = words
    sys.path[:] = [str(Path(words[1]).resolve().parent), *path]
    attach()
    code = 0
    try:
        runpy.run_path(words[1], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, int):
            code = stop.code
        elif stop.code is not None:
            print(stop.code, file=sys.stderr)
            code = 1
    except BaseException as error:  # noqa: BLE001 - as Python itself does
        sys.excepthook(type(error), error, _behind_runpy(error))
        code = 1
    atexit._run_exitfuncs()  # noqa: SLF001 - as the interpreter does at its end
    return code


def _behind_runpy(error: BaseException) -> Any:
    """Return the traceback from the script's own first frame on."""
    trace = error.__traceback__
    while trace is not None and (
        trace.tb_frame.f_code.co_filename in {__file__, runpy.__file__}
        or trace.tb_frame.f_globals.get("__name__") == "runpy"
    ):
        trace = trace.tb_next
    return trace
