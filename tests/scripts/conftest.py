"""Run fixtures/scripts in the way that users run scripts of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equivcheck.api import Job, outcomes
from equivcheck.case import Case
from equivcheck.scripts.target import Command, Script

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "fixtures" / "scripts"


def command(script, *arguments, launcher=(sys.executable,)):
    """Return a command line for a script of the fixtures, or for one at a path."""
    path = Path(script) if Path(script).is_absolute() else SCRIPTS / f"{script}.py"
    return " ".join(map(str, (*launcher, path, *arguments)))


@pytest.fixture
def decide():
    """Return a function that decides the case of two command lines."""

    def run(full, accumulated, *, optimizer_steps=8, timeout=None, expect=()):
        script = Script(Command.parse(full), Command.parse(accumulated), optimizer_steps)
        case = Case(script.target, 1, optimizer_steps=optimizer_steps)
        [entry] = outcomes([Job(script, case, tuple(expect))], timeout=timeout)
        return entry

    return run


def causes(entry):
    """Return the codes of a case, each with its status."""
    return [(each["code"], each["status"]) for each in entry["causes"]]
