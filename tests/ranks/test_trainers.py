"""Correct loops on several ranks are equivalent, and bare, as users write them, on one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

TRAINERS = Path(__file__).parents[2] / "fixtures" / "trainers"
STRATEGIES = ("ddp", "fsdp", "zero", "tensor_parallel", "pipeline")
FILES = [path for each in STRATEGIES for path in sorted((TRAINERS / each).glob("[a-z]*.py"))]
POINTS = [(ranks, k, split) for ranks in (2, 4) for k in (1, 2, 4) for split in ("even", "uneven")]


def _stated(path: Path) -> dict[str, Any]:
    return vars(sys.modules[load_subject(str(path)).fresh().train.__module__])


def _cases() -> list[object]:
    # The first point that a loop is written for by default; the others take minutes.
    found = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        first = (2, 2, "even")
        if "WORLD_SIZES = (4,)" in text:
            first = (4, 2, "even")
        elif "ACCUMULATION_STEPS = (1,)" in text:
            first = (2, 1, "even")
        found.extend(
            pytest.param(
                path,
                *point,
                id=f"{path.parent.name}-{path.stem}-R{point[0]}-K{point[1]}-{point[2]}",
                marks=[] if point == first else [pytest.mark.slow],
            )
            for point in POINTS
            if point[1] > 1 or first[1] == 1
        )
    return found


def _skip_what_is_not_written_for(
    stated: dict[str, Any], world_size: int, accumulation_steps: int, split: str
) -> None:
    if stated.get("DEVICE", "cpu") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if split not in stated.get("SPLITS", ("even", "uneven")):
        pytest.skip("the loop is not written for this cut")
    if world_size not in stated.get("WORLD_SIZES", (2, 4)):
        pytest.skip("the loop is not written for this number of ranks")
    if accumulation_steps not in stated.get("ACCUMULATION_STEPS", (2, 4)):
        pytest.skip("by design equivalent without accumulation only")
    if "possible" in stated and not stated["possible"](accumulation_steps, world_size):
        pytest.skip("the schedule asks for more micro-batches")


@pytest.mark.slow
@pytest.mark.parametrize(("path", "world_size", "accumulation_steps", "split"), _cases())
def test_trainer_is_equivalent(
    path: Path, world_size: int, accumulation_steps: int, split: str
) -> None:
    """No cause is found in a correct loop but a loss of precision that it states, and no warning but that one."""
    stated = _stated(path)
    _skip_what_is_not_written_for(stated, world_size, accumulation_steps, split)
    case = Case(
        str(path),
        accumulation_steps,
        split=split,
        world_size=world_size,
        strategy=path.parent.name,
        device=stated.get("DEVICE", "cpu"),
    )

    result = run_case(load_subject(str(path)), case)

    assert result["verdict"] == stated.get("VERDICT", "equivalent"), result["headline"]
    assert tuple(each["code"] for each in result["causes"]) == stated.get("EXPECT", ())
    expected = stated.get("WARNINGS", ()) if accumulation_steps > 1 else ()
    assert {*expected} == {each["code"] for each in result["warnings"]}
    assert result["detection_power"] < 1e-6 / accumulation_steps, result["notes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_trainer_works_bare(path: Path) -> None:
    """The same loop accumulates rightly in one process without a process group."""
    stated = _stated(path)
    if stated.get("DEVICE", "cpu") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if "ACCUMULATION_STEPS" in stated:
        pytest.skip("by design equivalent without accumulation only")

    result = run_case(load_subject(str(path)), Case(str(path), 2))

    assert result["verdict"] == "equivalent", result["headline"]
