"""The wheel, where there is no clone: suites, strategies and the plugin from an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from equivcheck.api import plan
from equivcheck.config import OPTIONS

ROOT = Path(__file__).parents[2]
TRAINER = """
import torch
from fixtures.models import RATE  # the user's own, which has nothing to do with ours
from suites import SCALE


def train(model, loader, accumulation_steps, loss, optimizer, scheduler, max_norm, precision):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    stepper = optimizer(model.parameters())
    schedule = scheduler(stepper)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "fp16")
    cycle = []
    for batch in loader:
        cycle.append(batch)
        if len(cycle) < accumulation_steps:
            continue
        count = sum(loss.count(each) for each in cycle)
        for each in cycle:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                share = loss(model, each, count)
            scaler.scale(share).backward()
        if max_norm is not None:
            scaler.unscale_(stepper)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(stepper)
        scaler.update()
        stepper.zero_grad()
        if schedule is not None:
            schedule.step()
        cycle = []
"""
TEST = """
import torch
from equivcheck.strategies import *
from hypothesis import given, settings


def build():
    return torch.nn.Linear(4, 5)


def train(model, loader, accumulation_steps):
    stepper = torch.optim.SGD(model.parameters(), 0.1)
    for step, batch in enumerate(loader):
        (torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"]) / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            stepper.step()
            stepper.zero_grad()


def test_it(equivcheck):
    rows = [{"x": torch.randn(8, 4), "y": torch.randint(0, 5, (8,))}]
    equivcheck(build=build, batches=rows, train=train, accumulation_steps=[2, 4])


@settings(max_examples=3, deadline=None)
@given(batches("classes"))
def test_batches(drawn):
    assert drawn()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build it, as `pip wheel .` does, with the build backend that is there."""
    pytest.importorskip("hatchling", reason="builds the wheel; it comes with equivcheck[test]")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [*pip(), "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, str(ROOT)],
        check=True,
        timeout=120,
    )
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Return the interpreter of an environment that has the wheel, and sees torch in ours."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    executable = folder / "bin" / "python"
    [site] = folder.glob("lib/python3*/site-packages")
    # After its own packages, so that the wheel comes before what is installed here.
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run(
        [*pip(), "--python", executable, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
        timeout=120,
    )
    return executable


@pytest.fixture
def ran(python, tmp_path):
    """Return a function that runs the interpreter in an empty folder."""
    hidden = ("PYTHON", "PYTEST", "GITHUB_", "EQUIVCHECK", "COV")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}

    def run(*arguments):
        return subprocess.run(
            [python, *arguments],
            cwd=tmp_path,
            env={**clean, "NO_COLOR": "1", "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
            timeout=280,
        )

    return run


def pip():
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def owned(folder):
    """Lay out a project whose packages are called as ours are."""
    for name, text in {
        "fixtures/__init__.py": "",
        "fixtures/models/__init__.py": "RATE = 0.1\n",
        "suites/__init__.py": "SCALE = 1024.0\n",
        "my_trainer.py": TRAINER,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_the_wheel_holds_what_suites_need(wheel):
    """Every suite and fixture with its data, and nothing that was compiled or tested here."""
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("equivcheck/_bundled/") for name in names if "_bundled" in name}

    for folder in ("suites", "fixtures"):
        stated = {
            str(path.relative_to(ROOT))
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert stated <= inside
    assert "equivcheck/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


@pytest.mark.slow
def test_the_wheel_is_what_runs(ran):
    told = ran("-c", "import equivcheck; print(equivcheck.__file__)")

    assert "site-packages" in told.stdout


@pytest.mark.slow
def test_list_says_what_would_run(ran):
    """The same cases as in a clone, with the same ids."""
    values = {name: option.default for name, option in OPTIONS.items()}
    jobs, _ = plan(["suite:all"], values, explicit=False)

    listed = ran("-m", "equivcheck", "list", "suite:all")

    found = re.findall(r"^([0-9a-f]{10})  suite:", listed.stdout, re.MULTILINE)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert found == [job.case.id for job in jobs]


@pytest.mark.slow
def test_suites_run(ran, tmp_path):
    """Side by side; every case is as theory says."""
    done = ran(
        *("-m", "equivcheck", "run", "suite:logging", "suite:tail", "-k", "K=2", "-j", "2"),
        *("--json", "r.json"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["cases"]
    assert len(cases) > 20
    assert all(case["theory"]["met"] for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_trainer_of_a_project_with_packages_of_our_names(ran, tmp_path, jobs):
    """Its `fixtures` and `suites` are its own, and ours are ours."""
    owned(tmp_path)
    done = ran(
        *("-m", "equivcheck", "run", "suite:amp", "--train", "my_trainer.py:train"),
        *("-k", "K=2", "-j", jobs, "--json", "r.json"),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    cases = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["cases"]
    assert {case["workload"] for case in cases} >= {"bf16", "fp16_clipped", "bf16_adam"}


@pytest.mark.slow
def test_strategies_and_the_plugin(ran, tmp_path):
    """Without a conftest: the entry point is the wheel's."""
    (tmp_path / "test_mine.py").write_text(TEST, encoding="utf-8")

    done = ran("-m", "pytest", "-q", "-W", "error", "-p", "no:randomly", "test_mine.py")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "equivcheck: 2 cases equivalent" in done.stdout
