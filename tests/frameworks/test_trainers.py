"""Each framework's trainer is equivalent, or divergent with its cause; missing frameworks are named."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

sys.path.insert(0, str(Path(__file__).parents[2]))

from fixtures import frameworks

pytestmark = pytest.mark.filterwarnings("default")  # a framework's warnings are its own


def name(path: Path) -> str:
    """Return a trainer's own name, and where it runs."""
    size, _ = frameworks.ranks(path)
    return path.stem if size == 1 else f"{path.stem}-{size}-ranks"


def marked(paths: list[Path]) -> list[object]:
    """Return the trainers as parameters, each with its environment as a marker."""
    return [
        pytest.param(
            path,
            id=f"{frameworks.family(path)}-{name(path)}",
            marks=getattr(pytest.mark, str(frameworks.family(path))),
        )
        for path in paths
    ]


# Weights in 4 bits are noisier than float32: a fault of 2.3e-3 was the least that would have been seen.
COARSER = {"peft_qlora": 1e-2}


def run(path: Path) -> dict[str, object]:
    reason = frameworks.missing(path)
    if reason is not None:
        pytest.skip(reason)
    size, strategy = frameworks.ranks(path)
    case = Case(str(path), accumulation_steps=4, world_size=size, strategy=strategy)
    return run_case(load_subject(str(path)), case)


@pytest.mark.parametrize("path", marked(frameworks.trainers()))
def test_a_correct_trainer_is_equivalent(path: Path) -> None:
    """The framework gives the full batch's update, and a small fault would have been seen."""
    case = run(path)

    assert case["verdict"] == "equivalent", case["headline"]
    # A framework that asserts float32 is judged as written: a fault of a thousandth is seen.
    limit = 1e-6 if case.get("judged") != "native" else COARSER.get(path.stem, 1e-3)
    assert case["detection_power"] < limit, case["notes"]


@pytest.mark.parametrize("path", marked(frameworks.mutants()))
def test_a_faulty_twin_shows_its_cause(path: Path) -> None:
    """The fault that its name says is proved, and no other."""
    case = run(path)

    assert case["verdict"] == "divergent", case["headline"]
    assert [(c["code"], c["status"]) for c in case["causes"]] == [(path.stem[:5].upper(), "proved")]


def test_every_trainer_has_an_environment() -> None:
    """Every family has trainers; each is in the environment of its framework."""
    covered = {frameworks.family(path) for path in frameworks.trainers()}
    assert covered == set(frameworks.FAMILIES)
    assert covered == {"transformers", "lightning", "deepspeed", "jax", "keras"}
