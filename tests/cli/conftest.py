"""The command line in process, on a stub of the engine: every outcome in milliseconds."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest

from equivcheck.case import Case
from equivcheck.cli import main
from equivcheck.errors import UsageError

SUBJECT = """\
def build(): ...
def batches(): ...
def train(model, loader, accumulation_steps): ...
"""


def passing(**more):
    gradients = {"relative": 2.1e-16, "control": 1.9e-16, "scale": 1.0, "cosine": 1.0}
    return {
        "verdict": "equivalent",
        "headline": "equivalent",
        "causes": [],
        "divergence": {"gradients": gradients},
        "margin": 57.0,
        "detection_power": 1.2e-14,
        "seconds": 0.5,
    } | more


def failing(code="EQ101", **more):
    gradients = {"relative": 3.0, "control": 1.9e-16, "scale": 4.0, "cosine": 1.0}
    return {
        "verdict": "divergent",
        "causes": [
            {
                "code": code,
                "status": "proved",
                "optimizer_step": 0,
                "evidence": {
                    "intervention": {
                        "put_right": ["reweight"],
                        "relative_before": 3.0,
                        "relative_after": 1.1e-16,
                    }
                },
            }
        ],
        "divergence": {"gradients": gradients},
        "attribution": {
            "reference_weights": [0.25] * 4,
            "candidate_weights": [1.0] * 4,
            "reference_residual": 7e-16,
            "candidate_residual": 6e-16,
        },
        "interventions": [{"codes": [code], "relative": 1.1e-16, "within_noise": True}],
        "margin": 4e-15,
        "seconds": 0.5,
    } | more


class Engine:
    """Answers `run_case` with what a test has put in `answers`, by accumulation steps."""

    passing = staticmethod(passing)
    failing = staticmethod(failing)

    def __init__(self):
        self.answers = {}
        self.ran = []

    def plan_cases(self, subject, accumulation_steps, explicit, world_sizes=(1,), **fields):
        fitting = [k for k in accumulation_steps if k <= 16]
        if explicit and fitting != accumulation_steps:
            raise UsageError("accumulation_steps is larger than the batch")
        cases = [Case(subject.target, k, **fields) for k in fitting]
        return cases, [f"K={k} is skipped" for k in accumulation_steps if k > 16]

    def run_case(self, subject, case, *, expect, timeout, progress):
        self.ran.append((case, expect, timeout))
        progress("candidate")
        print("from user code")
        answer = self.answers.get(case.accumulation_steps, passing())
        if isinstance(answer, BaseException):
            raise answer
        return answer


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    def __str__(self):
        return f"exit {self.code}\n--- stdout\n{self.out}--- stderr\n{self.err}"


@pytest.fixture
def engine(monkeypatch):
    stub = Engine()
    module = ModuleType("equivcheck.decide")
    # Looked up at each call, so that a test can replace them.
    module.plan_cases = lambda *given, **named: stub.plan_cases(*given, **named)  # noqa: PLW0108
    module.run_case = lambda *given, **named: stub.run_case(*given, **named)  # noqa: PLW0108
    monkeypatch.setitem(sys.modules, "equivcheck.decide", module)
    return stub


@pytest.fixture
def cli(monkeypatch, tmp_path, capsys, engine):
    """Return a function that runs a command line in an empty folder with a subject in it."""
    assert engine is not None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    ours = [name for name in os.environ if name.startswith("EQUIVCHECK_")]
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", *ours):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "train_step.py").write_text(SUBJECT, encoding="utf-8")

    def run(*arguments):
        capsys.readouterr()
        code = main(list(arguments))
        streams = capsys.readouterr()
        return Outcome(code, streams.out, streams.err)

    return run
