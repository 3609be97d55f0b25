"""The plugin on a stub of the engine, in process and without torch; and the real one, in a process of its own."""

from __future__ import annotations

import os
import sys
import textwrap
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest

from equivcheck.case import Case
from equivcheck.errors import UsageError

# A subject whose fault a test chooses: the loop of every tutorial, and what may be wrong with it.
SUBJECT = """\
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


def batches():
    return [{"x": torch.randn(8, 4), "y": torch.randn(8, 1)} for _ in range(2)]


def train(model, loader, accumulation_steps, divide=True):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(loader):
        loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
        (loss / accumulation_steps if divide else loss).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def undivided(model, loader, accumulation_steps):
    train(model, loader, accumulation_steps, divide=False)
"""


def answer(target, case):
    """Return what the stub finds: the code that the target's name begins with, or nothing."""
    gradients = {"relative": 2.1e-16, "control": 1.9e-16, "scale": 1.0, "cosine": 1.0}
    found = {
        "verdict": "equivalent",
        "headline": "equivalent",
        "causes": [],
        "divergence": {"gradients": gradients},
        "margin": 57.0,
        "detection_power": 1.2e-14,
        "seconds": 0.5,
        "location": "train_step.py:3",
    }
    if target.startswith("EQ"):
        gradients.update(relative=3.0, scale=float(case.accumulation_steps))
        found |= {
            "verdict": "divergent",
            "headline": "",
            "causes": [
                {"code": target[:5], "status": "proved", "optimizer_step": 0, "evidence": {}}
            ],
            "per_parameter": [
                {"name": f"layers.{i}.weight", "relative": 3.0, "scale": 4.0, "cosine": 1.0}
                for i in range(30)
            ],
        }
    elif target.startswith(("inconclusive", "invalid")):
        found["verdict"] = found["headline"] = target.split(".")[0]
    elif target.startswith("raises"):
        found |= {"verdict": "error", "error": {"type": "StepError", "message": "train-raised"}}
    return found


@pytest.fixture
def ran(monkeypatch):
    """Put a stub in the place of the engine and return the cases that it runs."""
    cases = []

    def plan_cases(subject, accumulation_steps, *, explicit, world_sizes=(1,), **fields):
        fitting = [k for k in accumulation_steps if k <= 16]
        if explicit and len(fitting) < len(accumulation_steps):
            raise UsageError("accumulation_steps is larger than the batch")
        points = [(r, k) for r in world_sizes for k in fitting]
        return [Case(subject.target, k, world_size=r, **fields) for r, k in points], []

    def run_case(subject, case, *, expect, **_):
        cases.append(case)
        found = answer(subject.kind, case)
        codes = {cause["code"] for cause in found["causes"]}
        if expect and codes == set(expect):
            found["verdict"] = "expected"
        return found

    class Parts(SimpleNamespace):
        def __init__(self, target, build, batches, train, objective, name):
            super().__init__(target=target, train=train, name=name)

    def load_subject(target, train=None):
        if isinstance(target, Parts):
            kind = target.target or target.train.__name__
            name, kind, repeatable = target.name, str(kind), False
        else:
            name, kind, repeatable = str(target), str(target), True
        return SimpleNamespace(target=name, kind=kind, repeatable=repeatable, asks=None)

    def put(name, **functions):
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)

    put("equivcheck.decide", plan_cases=plan_cases, run_case=run_case)
    put("equivcheck.execute", process_state=nullcontext)
    put("equivcheck.ranks.team", kept=nullcontext)
    put("equivcheck.subject", load_subject=load_subject, Parts=Parts)
    put("equivcheck.suite", expanded=lambda target: [target], is_suite=lambda _: False)
    put("equivcheck.workload", cases_of=None)
    return cases


@pytest.fixture
def clean(monkeypatch):
    """Take away what this very session sets for its own checks and colours."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    ours = [name for name in os.environ if name.startswith(("EQUIVCHECK_", "GITHUB_", "PYTEST_"))]
    for name in ("FORCE_COLOR", "CI", "BUILD_NUMBER", *ours):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stubbed(pytester, clean, ran):
    """Return a function that runs a test file in process, on the stub."""

    def run(source, *arguments):
        if source:
            pytester.makepyfile(test_step=textwrap.dedent(source))
        return pytester.runpytest_inprocess("-p", "no:randomly", *arguments)

    return run


@pytest.fixture
def real(pytester, clean):
    """Return a function that runs a test file in a process of its own, on the engine, beside a subject."""
    pytester.makepyfile(train_step=SUBJECT)

    def run(source, *arguments):
        if source:
            pytester.makepyfile(test_step=textwrap.dedent(source))
        given = () if "randomly" in arguments else ("-p", "no:randomly")
        return pytester.runpytest_subprocess("-W", "error", *given, *arguments)

    return run
