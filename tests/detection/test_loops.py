"""Loops in many styles: the right ones are equivalent, the wrong ones yield their codes, proved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

LOOPS = Path(__file__).parents[2] / "fixtures" / "loops"
FILES = sorted(path for path in LOOPS.glob("*.py") if path.name != "__init__.py")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulation_steps", [2, 4])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_loop_gets_its_verdict(path: Path, accumulation_steps: int) -> None:
    """The verdict and the proved codes are those that the file's first line states, by K where a proof needs it."""
    stated = json.loads(path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# EXPECT "))
    verdicts = stated["verdict"] if isinstance(stated["verdict"], list) else [stated["verdict"]]
    allowed = [sorted(codes) for codes in (stated["causes"], *stated.get("any_of", []))]
    suspected = stated.get("suspected", {}).get(str(accumulation_steps))

    split = stated.get("split", "even")
    case = run_case(load_subject(str(path)), Case(str(path), accumulation_steps, split=split))

    proved = sorted(cause["code"] for cause in case["causes"] if cause["status"] == "proved")
    assert case["verdict"] in verdicts, case["headline"]
    if suspected is not None:
        found = [(cause["code"], cause["status"]) for cause in case["causes"]]
        assert found == [(code, "suspected") for code in suspected], case["headline"]
        return
    assert proved in allowed, case["headline"]
