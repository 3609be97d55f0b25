"""What a watched process keeps: its output, its exit code, its environment; and what is left of it: nothing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equivcheck.attach.launch import launch
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import load
from tests.scripts.conftest import ROOT, command

LOOP = """
import os, sys, torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained")
"""


@pytest.fixture
def watched(tmp_path):
    """Return a function that runs a script's text as a process of its own and returns how it ended and its record."""

    def run(source, **spec):
        path = tmp_path / "script.py"
        path.write_text(source, encoding="utf-8")
        folder = tmp_path / "run"
        spec = {"neutral": False, "ends": False, **spec}
        asked = Spec("recorded", str(folder / "ranks"), "watch", **spec)
        ended = launch([sys.executable, str(path)], asked, folder)
        rank = folder / "ranks" / "rank-0"
        return ended, load(rank, finished=False) if rank.exists() else None

    return run


@pytest.mark.parametrize(
    ("ending", "code", "how"),
    [
        ("", 0, "exit"),
        pytest.param("sys.exit(7)", 7, "exit", marks=pytest.mark.slow),
        ("sys.stdout.flush(); os._exit(5)", 5, "exit"),
        ("raise ValueError('no')", 1, "exception"),
    ],
    ids=["plain", "sys.exit", "os._exit", "raise"],
)
def test_a_script_ends_as_it_would_alone(watched, ending, code, how):
    """However it ends, its exit code and output are its own, and everything seen is written."""
    ended, (recording, facts) = watched(LOOP + ending)

    assert ended.code == code
    assert ended.output.startswith("trained\n")
    assert facts.ended == how
    assert len(recording.steps) == 3
    assert "equivcheck" not in ended.output


GROUPS = """
import sys, tempfile, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def once(address):
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    dist.destroy_process_group()

with tempfile.TemporaryDirectory() as folder:
    for count in range(40):
        once(f"{folder}/{count}")
print("trained")
"""


@pytest.mark.timeout(120)
def test_a_group_that_is_destroyed_before_its_model_does_not_hang_the_script(watched):
    """Unwatched, torch 2.13.0 deadlocked in three of three such scripts, in one of their 40 groups."""
    ended, (recording, _) = watched(GROUPS, optimizer_steps=40)

    assert (ended.code, ended.output.splitlines()[-1]) == (0, "trained")
    assert len(recording.steps) == 40


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_had_written(watched):
    _, (recording, facts) = watched(LOOP + "import signal; os.kill(os.getpid(), signal.SIGKILL)")

    assert facts.ended == "running"
    assert 1 <= len(recording.steps) <= 3


@pytest.mark.slow
def test_a_script_without_training_leaves_nothing(watched):
    """A launcher that imports torch, or a script that never steps, is no training process."""
    ended, found = watched("import torch; print(torch.ones(1).item())")

    assert (ended.code, ended.output, found) == (0, "1.0\n", None)


@pytest.mark.slow
def test_after_the_last_step_asked_for_a_script_goes_on_unwatched(watched):
    source = LOOP + "print(torch.nn.Module.__call__.__qualname__)"
    ended, (recording, facts) = watched(source, optimizer_steps=1)

    assert ended.output == "trained\nModule._wrapped_call_impl\n"
    assert (len(recording.steps), facts.ended) == (1, "limit")


@pytest.mark.slow
def test_the_environments_own_sitecustomize_is_run_too(watched, tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import builtins; builtins.mine = 1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    ended, (recording, _) = watched(LOOP + "import builtins, sitecustomize; print(builtins.mine)")

    assert ended.output == "trained\n1\n"
    assert len(recording.steps) == 3


def equivcheck(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, "-m", "equivcheck", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def running(mark):
    """Return the ids of processes whose command line holds a mark."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in each.read_bytes():
                found.append(int(each.parent.name))
        except OSError:
            continue
    return found


SLEEPER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # MARK"])
open("started", "w").close()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["timeout", "interrupt", "terminate"])
def test_no_process_is_left_behind(tmp_path, how):
    """Time out, Ctrl-C and a polite kill end the script and what it started."""
    mark = f"mark-{how}-{os.getpid()}"
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER.replace("MARK", mark), encoding="utf-8")
    line = f"{sys.executable} {script}"
    limit = ("--timeout", "8") if how == "timeout" else ()
    process = equivcheck("run", "--full", line, "--accumulated", line, *limit, cwd=tmp_path)
    try:
        deadline = time.monotonic() + (0 if how == "timeout" else 120)
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        if how != "timeout":
            time.sleep(0.5)
            process.send_signal(signal.SIGINT if how == "interrupt" else signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    for _ in range(50):
        if not running(mark):
            break
        time.sleep(0.1)

    assert running(mark) == []
    assert process.returncode == {"timeout": 3, "interrupt": 130, "terminate": 143}[how], output
    if how == "timeout":
        assert "timed-out: no verdict after 8 s" in output


@pytest.mark.slow
def test_recordings_are_made_and_compared(tmp_path):
    """Record keeps output and exit code; compare finds agreement, a fault, and a broken recording by its file."""

    def run(*arguments):
        process = equivcheck(*arguments, cwd=tmp_path)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    for name, extra in (
        ("full", ()),
        ("accumulated", ("--batch-size", 4, "--accum", 4)),
        ("faulty", ("--batch-size", 4, "--accum", 4, "--mistake", "missing-division")),
    ):
        code, output = run("record", "-o", name, "--", *command("classify", *extra).split())
        assert code == 0
        assert re.search(r"epoch 1 loss .*\nrecorded 6 optimizer steps of 1 rank in", output), (
            output
        )

    code, output = run("compare", "full", "accumulated")
    assert (code, "equivalent" in output) == (0, True), output

    code, output = run("compare", "full", "faulty", "--json", "result.json")
    assert code == 1
    assert "EQ101 missing-division (suspected)" in output
    told = " ".join(output.split())
    assert "replay equivcheck compare full faulty learn" in told
    for name, extra in (
        ("full", ""),
        ("accumulated", " --batch-size 4 --accum 4 --mistake missing-division"),
    ):
        assert f"--{name} '{command('classify')}{extra}'" in told
    code, output = run("replay", "", "--result", "result.json")
    assert code == 2
    assert re.search(
        r"there is nothing to run again\n.*\n +fix +equivcheck compare full faulty", output
    )

    path = tmp_path / "faulty" / "rank-0" / "recording.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, output = run("compare", "full", "faulty")
    assert code == 2
    assert "recording.safetensors" in output

    path = tmp_path / "full" / "rank-0" / "recording.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    code, output = run("compare", "full", "accumulated")
    assert code == 2
    assert "recording-cut-short" in output
