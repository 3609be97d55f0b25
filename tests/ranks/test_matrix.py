"""Every fault on ranks yields exactly its code, proved, where it has an effect, and none where it has not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants" / "ranks"
FILES = sorted(MUTANTS.glob("eq*.py"))
POINTS = [(ranks, k, split) for ranks in (2, 4) for k in (2, 4) for split in ("even", "uneven")]


def _cases() -> list[object]:
    # One point by default; the others are the same faults again, and take minutes.
    return [
        pytest.param(
            path,
            *point,
            id=f"{path.stem}-R{point[0]}-K{point[1]}-{point[2]}",
            marks=[] if point == (2, 2, "even") else [pytest.mark.slow],
        )
        for path in FILES
        for point in POINTS
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.parametrize(("path", "world_size", "accumulation_steps", "split"), _cases())
def test_mutant_yields_its_code(
    path: Path, world_size: int, accumulation_steps: int, split: str, cell: dict[str, str]
) -> None:
    """Each mutant yields its codes and no others; where it has no effect the verdict is `equivalent`."""
    subject = load_subject(str(path))
    stated = vars(sys.modules[subject.fresh().train.__module__])
    if split not in stated.get("SPLITS", ("even", "uneven")):
        pytest.skip("the loop is not written for this cut")
    if world_size not in stated.get("WORLD_SIZES", (2, 4)):
        pytest.skip("the fault is written for another number of ranks")
    effect = stated["effect"](accumulation_steps, split, world_size)
    expected = sorted(stated["EXPECT"]) if effect else []
    warned = sorted(stated.get("WARNINGS", ())) if effect else []
    verdict = "divergent" if expected else "equivalent"
    case = Case(
        str(path),
        accumulation_steps,
        split=split,
        world_size=world_size,
        strategy=stated["STRATEGY"],
    )

    result = run_case(subject, case)

    found = sorted(cause["code"] for cause in result["causes"])
    warnings = sorted({each["code"] for each in result["warnings"]})
    cell.update(
        row=path.stem,
        column=f"R={world_size} K={accumulation_steps} {split[:4]}",
        found="+".join(found) or "+".join(warnings) or "-",
    )
    assert expected == found, result["headline"]
    assert verdict == result["verdict"], result["headline"]
    if warned or not effect:
        assert warned == warnings
    unproved = {cause["code"] for cause in result["causes"] if cause["status"] != "proved"}
    assert not unproved
