"""Every correct trainer is equivalent, at every cut that it is written for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

sys.path.insert(0, str(Path(__file__).parents[2]))

from fixtures import frameworks

TRAINERS = Path(__file__).parents[2] / "fixtures" / "trainers"
# Those that need a framework run in its environment (make test-frameworks).
FILES = [path for path in sorted(TRAINERS.glob("[a-z]*.py")) if frameworks.family(path) is None]


@pytest.mark.parametrize("split", ["even", "uneven"])
@pytest.mark.parametrize("accumulation_steps", [2, 4])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trainer_is_equivalent(path: Path, accumulation_steps: int, split: str) -> None:
    """No cause is found in a correct loop, and the fault that would have been seen is small."""
    subject = load_subject(str(path))
    stated = vars(sys.modules[subject.fresh().train.__module__])
    if split not in stated.get("SPLITS", ("even", "uneven")):
        pytest.skip("the loop is not written for this cut")

    case = run_case(subject, Case(str(path), accumulation_steps, split=split))

    assert case["verdict"] == "equivalent", case["headline"]
    assert case["causes"] == []
    assert case["detection_power"] < 1e-6 / accumulation_steps, case["notes"]
