"""Code under test that ends Python: nothing finished is lost, and the exit code says so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

GUARDED = """
import os, signal, sys, time
from equivcheck.cli import guard
from equivcheck.errors import EquivcheckError

def command(ended):
    print("begun", repr(ended), flush=True)
    {body}
    return 1

try:
    code = guard.guarded(command, goes_on={goes_on})
except EquivcheckError as error:
    print(error.message)
    code = error.exit_code
sys.exit(code)
"""


def run_guarded(body, *, goes_on=True):
    source = GUARDED.format(body=body, goes_on=goes_on)
    return subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )


def test_the_exit_code_is_the_childs():
    done = run_guarded("pass")

    assert (done.returncode, done.stdout) == (1, "begun ''\n")


def test_what_ends_an_interpreter_behind_its_result_is_no_result():
    done = run_guarded(
        "import atexit; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))"
    )

    assert done.returncode == 1


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os._exit(0)", "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
    ],
)
def test_a_child_that_is_ended_is_begun_again_and_told_how(end, how):
    done = run_guarded(f"if not ended: {end}")

    assert done.returncode == 1
    assert done.stdout.splitlines() == ["begun ''", f"begun {how!r}"]


def test_it_goes_on_as_long_as_cases_are_finished(tmp_path):
    body = f"""
    with open({str(tmp_path / "cases")!r}, "a") as file:
        file.write("x")
        if file.tell() > 5:
            return 1
    guard.case_finished()
    os._exit(7)"""
    done = run_guarded(body)

    assert done.returncode == 1
    assert done.stdout.count("begun") == 6


@pytest.mark.parametrize(("goes_on", "begun"), [(True, 3), (False, 1)])
def test_it_gives_up_where_going_on_does_not_help(goes_on, begun):
    done = run_guarded("os._exit(9)", goes_on=goes_on)

    assert done.returncode == 3
    assert done.stdout.count("begun") == begun
    assert "process-ended: the process ended with exit code 9" in done.stdout


WAITS = "time.sleep(60)"


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_is_sent_to_the_waiting_process_reaches_the_child(how):
    """And the child's own answer counts."""
    body = f"""
    def answer(number, frame):
        print("heard", number, flush=True); sys.stdout.flush()
        raise SystemExit
    signal.signal({int(how)}, answer)
    try: print(os.getpid(), flush=True); {WAITS}
    except SystemExit: return 5"""
    process = _started(body)
    child = _line(process)
    process.send_signal(how)
    out, _ = process.communicate(timeout=30)

    assert f"heard {int(how)}" in out
    assert process.returncode == 5
    assert not _lives(child)


def test_a_child_that_a_signal_ends_is_not_begun_again():
    process = _started(f"print(os.getpid(), flush=True); {WAITS}")
    child = _line(process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)

    assert process.returncode == 128 + signal.SIGTERM
    assert "begun" not in out
    assert not _lives(child)


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux's kernel ends a child with its parent"
)
def test_a_child_does_not_outlive_the_process_that_waits():
    process = _started(f"print(os.getpid(), flush=True); {WAITS}")
    child = _line(process)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)

    assert not _lives(child)


def _started(body):
    source = GUARDED.format(body=body, goes_on=True)
    return subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)


def _line(process):
    assert process.stdout.readline().startswith("begun")
    return int(process.stdout.readline())


def _lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


SUBJECT = """
import os
import torch
from torch import nn

def build():
    return nn.Linear(4, 2)

def batches():
    return [(torch.randn(8, 4), torch.arange(8) % 2)] * 2

def train(model, loader, accumulation_steps):
    if accumulation_steps == 2:
        os._exit(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader):
        (nn.functional.cross_entropy(model(x), y) / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


def equivcheck(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "equivcheck", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
    )


def test_a_case_that_ends_python_is_an_error_and_the_others_are_judged(tmp_path):
    (tmp_path / "step.py").write_text(SUBJECT, encoding="utf-8")
    done = equivcheck("run", "step.py", "--json", "out.json", cwd=tmp_path)
    cases = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["cases"]

    assert done.returncode == 3
    assert [case["verdict"] for case in cases] == ["error", "equivalent"]
    assert "Python ended with exit code 0 in this case, 2 times" in cases[0]["headline"]

    again = equivcheck("replay", cases[0]["id"], "--result", "out.json", cwd=tmp_path)
    assert again.returncode == 3
    assert "process-ended: the process ended with exit code 0" in again.stderr


def test_a_file_that_ends_python_when_it_is_loaded_ends_the_run(tmp_path):
    (tmp_path / "step.py").write_text("import os; os._exit(0)\n", encoding="utf-8")
    done = equivcheck("run", "step.py", cwd=tmp_path)

    assert done.returncode == 3
    assert "3 times without a finished case between" in " ".join(done.stderr.split())
