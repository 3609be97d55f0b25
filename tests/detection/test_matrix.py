"""Every mutant yields exactly its code, proved, at every cut where it has an effect, and none where it has not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants"
# Those on ranks, and those of frameworks, which have environments of their own, are tested beside their correct twins.
ELSEWHERE = {"ranks", "frameworks"}
FILES = sorted(path for path in MUTANTS.rglob("eq*.py") if path.parent.name not in ELSEWHERE)
CUTS = [(k, split) for k in (2, 4, 8) for split in ("even", "uneven")]


def _cases() -> list[object]:
    # One K by default; the others are the same faults again, and take minutes.
    return [
        pytest.param(
            path,
            k,
            split,
            id=f"{path.stem}-K{k}-{split}",
            marks=[] if k == 4 else [pytest.mark.slow],
        )
        for path in FILES
        for k, split in CUTS
    ]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize(("path", "accumulation_steps", "split"), _cases())
def test_mutant_yields_its_code(
    path: Path, accumulation_steps: int, split: str, cell: dict[str, str]
) -> None:
    """Each mutant yields its codes and no others; where it has no effect the verdict is `equivalent`."""
    subject = load_subject(str(path))
    stated = vars(sys.modules[subject.fresh().train.__module__])
    if split not in stated.get("SPLITS", ("even", "uneven")):
        pytest.skip("the contract forbids this cut for what train asks for")
    effect = stated["effect"](accumulation_steps, split)
    expected = sorted(stated["EXPECT"]) if effect else []
    verdict = stated.get("VERDICT", "divergent") if effect else "equivalent"

    case = run_case(subject, Case(str(path), accumulation_steps, split=split))

    found = sorted(cause["code"] for cause in case["causes"])
    cell.update(
        row=path.stem, column=f"K={accumulation_steps} {split}", found="+".join(found) or "-"
    )
    assert expected == found
    assert verdict == case["verdict"]
    unproved = {cause["code"] for cause in case["causes"] if cause["status"] != "proved"}
    assert unproved <= {"EQ000"}


def test_there_are_mutants_for_every_code() -> None:
    """A code without a mutant would be a claim that nothing checks."""
    from equivcheck.causes import CAUSES

    planted = {path.stem[:5].upper() for path in MUTANTS.rglob("eq*.py")}

    assert set(CAUSES) == planted
    assert len(FILES) >= 40
