"""`equivcheck search`: the smallest failing case, the commands that repeat it, and a script that stands alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from equivcheck.cli import main

HEAD = """
import torch
from torch import nn

def build():
    return nn.Linear(3, 1)

def batches():
    return [{{"x": torch.randn(12, 3), "y": torch.randn(12, 1), "name": "one"}} for _ in range(2)]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(loader):
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"]{reduction})
        {backward}
        if (step + 1) % accumulation_steps == 0 or step + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
"""
# Right wherever K divides the batch, as every tutorial has it.
DIVIDES = HEAD.format(reduction="", backward="(loss / accumulation_steps).backward()")
# Each row counts the same, whatever the cut; what it is divided by is a constant.
RIGHT = HEAD.format(reduction=', reduction="sum"', backward="(loss / 12).backward()")
RAISES = HEAD.format(
    reduction=', reduction="sum"',
    backward='assert len(batch["x"]) > 1, "one row"\n        (loss / 12).backward()',
)


@pytest.fixture
def search(tmp_path, monkeypatch, capsys):
    """Return a function that searches a subject in an empty folder: exit code and what was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)

    def run(source, *arguments):
        (tmp_path / "loop.py").write_text(source, encoding="utf-8")
        capsys.readouterr()
        code = main(["search", "loop.py", *arguments])
        return code, capsys.readouterr()

    return run


def stands_alone(path):
    """Run a script where equivcheck cannot be imported, and return its last line of stderr."""
    blocked = f"import runpy, sys; sys.modules['equivcheck'] = None; runpy.run_path({str(path)!r})"
    ended = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, check=False
    )
    return ended.returncode, (ended.stderr.strip().splitlines() or [""])[-1]


def test_a_batch_that_k_does_not_divide_is_found_and_shrunk(search, tmp_path):
    """The default cases are all right; what fails is one step of three rows with K = 2, and its script says so."""
    code, printed = search(DIVIDES, "--split", "even")
    result = json.loads((tmp_path / "reports/latest/result.json").read_text(encoding="utf-8"))
    [case] = result["cases"]

    assert code == 1
    assert (case["accumulation_steps"], case["rows"], case["split"]) == (2, "0:0-2", "even")
    assert "EQ103 mean-of-means" in printed.out.splitlines()[2]
    assert "run       equivcheck run loop.py --accumulation-steps 2 --rows 0:0-2" in printed.out
    assert f"replay    equivcheck replay {case['id']}" in printed.out

    ended, said = stands_alone(tmp_path / "repro.py")
    assert (ended, said.split(" differ by ")[0]) == (
        1,
        "AssertionError: gradients of the first step",
    )


def test_the_printed_commands_repeat_the_case(search, tmp_path, capsys):
    """`run` with the rows has the very same case, and `replay` finds it on record."""
    search(DIVIDES, "--split", "even")
    [case] = json.loads((tmp_path / "reports/latest/result.json").read_text("utf-8"))["cases"]
    capsys.readouterr()

    assert main(["replay", case["id"]]) == 1
    assert f"STILL DIVERGENT  {case['id']}" in capsys.readouterr().out
    assert main(["run", "loop.py", "--accumulation-steps", "2", "--rows", "0:0-2"]) == 1
    assert case["id"] in capsys.readouterr().out


def test_the_script_passes_once_the_fault_is_mended(search, tmp_path):
    """It asserts the difference, so it can stay as a test."""
    search(DIVIDES, "--split", "even")
    script = tmp_path / "repro.py"
    text = script.read_text(encoding="utf-8")
    mended = text.replace(
        "(loss / accumulation_steps).backward()", "(loss * len(batch['x']) / 3).backward()"
    )

    assert mended != text
    script.write_text(mended, encoding="utf-8")
    assert stands_alone(script) == (0, "")


def test_a_right_loop_passes(search, tmp_path):
    """With the number of cases; the script of an earlier search stays as it is."""
    code, printed = search(RIGHT, "--cases", "12")

    assert code == 0
    assert "12 cases, no failure; 12 equivalent" in printed.out
    assert not (tmp_path / "repro.py").exists()


def test_a_cut_that_raises_is_found_too(search, tmp_path):
    """Where no case diverges, the first that raises is shrunk, with the exit code of `run`."""
    code, printed = search(RAISES)
    [case] = json.loads((tmp_path / "reports/latest/result.json").read_text("utf-8"))["cases"]

    assert code == 3
    assert (case["accumulation_steps"], case["rows"]) == (2, "0:0-1")
    assert "AssertionError: one row" in printed.out


def test_declared_causes_are_no_failure(search):
    """As on the command line of `run`: what theory predicts is not searched for."""
    code, printed = search(DIVIDES, "--split", "uneven", "--expect", "EQ103", "--cases", "2")

    assert code == 0
    assert "2 expected" in printed.out


def test_a_loop_with_neighbours_is_embedded_by_its_path(search, tmp_path):
    """What it imports from its own folder is not in its text."""
    (tmp_path / "neighbour.py").write_text("RATE = 0.1\n", encoding="utf-8")
    search(DIVIDES.replace("import torch\n", "import torch\nimport neighbour\n", 1))
    text = (tmp_path / "repro.py").read_text(encoding="utf-8")

    assert f"sys.path.insert(0, {str(tmp_path)!r})" in text
    assert stands_alone(tmp_path / "repro.py")[0] == 1


# Each rank divides by its own rows: a mean of ranks, right wherever they have equally many.
RANKS = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

def build():
    return nn.Linear(3, 1)

def batches():
    return [{"x": torch.randn(8, 3), "y": torch.randn(8, 1)} for _ in range(2)]

def train(model, loader, accumulation_steps, world_size):
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = []
    for step, batch in enumerate(loader):
        cycle.append(batch)
        if len(cycle) == accumulation_steps or step + 1 == len(loader):
            rows = sum(len(each["x"]) for each in cycle)
            for each in cycle:
                loss = nn.functional.mse_loss(model(each["x"]), each["y"], reduction="sum")
                (loss / rows).backward()
            optimizer.step()
            optimizer.zero_grad()
            cycle = []
"""


def test_a_fault_of_ranks_is_found_and_shrunk(search, tmp_path):
    """One rank is right in every cut; two are wrong where they have unequal shares, and no single process shows it."""
    code, printed = search(RANKS, "--world-size", "1,2", "--strategy", "ddp", "--split", "even")
    [case] = json.loads((tmp_path / "reports/latest/result.json").read_text("utf-8"))["cases"]

    assert code == 1
    assert (case["world_size"], case["strategy"], case["accumulation_steps"]) == (2, "ddp", 2)
    assert [cause["code"] for cause in case["causes"]] == ["EQ501"]
    assert case["rows"] == "0:0-4"  # five rows: three and two
    assert "--world-size 2 --strategy ddp" in printed.out
    assert "repro     none: the case needs 2 processes" in printed.out
    assert not (tmp_path / "repro.py").exists()


def test_ranks_that_are_right_pass(search):
    """In every number of ranks that was asked for."""
    right = RANKS.replace("(loss / rows).backward()", "(loss * world_size / 8).backward()")
    code, printed = search(right, "--world-size", "1,2", "--strategy", "ddp", "--cases", "8")

    assert code == 0
    assert "8 cases, no failure; 8 equivalent" in printed.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--cases", "0"), "--cases is '0'"),
        (("--cases", "x"), "--cases is 'x'"),
        (("--repro", "loop.py"), "was not written by a search"),
        (("--repro", "."), "cannot write --repro"),
        (("loop.py",), "2 targets given"),
        (("--rows", "0:9-3"), "--rows is '0:9-3'"),
        (("--rows", "0:12"), "no-such-row"),
    ],
    ids=[
        "no-case",
        "no-number",
        "a-file-of-the-user",
        "a-folder",
        "two-targets",
        "rows",
        "no-such-row",
    ],
)
def test_mistakes_are_usage_errors(search, tmp_path, arguments, told):
    """Before anything runs or is overwritten."""
    code, printed = search(DIVIDES, *arguments)

    assert code == 2
    assert told in printed.err
    assert (tmp_path / "loop.py").read_text(encoding="utf-8") == DIVIDES
