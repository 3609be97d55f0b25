"""Measure, on correct code, what the limits of precision.py and noise.py are set by.

Run by hand: `python tests/bench/calibrate.py [FILE.md]` writes the table to FILE.md or stdout.

Every case of the family in fixtures/family.py over dtype, norm, optimizer and accumulation_steps
is run without being judged; what is written down is

- *units*: rounding of the accumulation, in unit roundoffs of the parameters' dtype;
- *full*: the full batch's own error in that precision, in the same units;
- *ratio*: how far the candidate is from the reference, relative to the control;
- *floor*: the same, relative to gamma(n, 2**-53), n the length of the sums.

K accumulation steps.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equivcheck.case import Case
from equivcheck.noise import gamma
from equivcheck.precision import judge_precision
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment
from equivcheck.verdict import overall, roundoff_of
from fixtures.family import DTYPES, NORMS, Correct

OPTIMIZERS = ("sgd", "adamw")
STEPS = (1, 2, 4, 8, 16, 32, 64, 128)
ROWS = 128


def main(path: str | None) -> None:
    torch.set_num_threads(1)
    by: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    for dtype in DTYPES:
        for k in STEPS:
            for norm in NORMS:
                for optimizer in OPTIMIZERS:
                    member = Correct(norm, "mean", optimizer, dtype, rows=ROWS, width=32)
                    by[dtype, k].append(measure(member, k))
    text = table(by)
    if path is None:
        print(text)
    else:
        Path(path).write_text(text, encoding="utf-8")


def measure(member: Correct, k: int) -> dict[str, float]:
    """Return the numbers of one case."""
    experiment = SubjectExperiment(
        load_subject(member), Case(target=str(member), accumulation_steps=k)
    )
    try:
        precision = judge_precision(experiment)
        unit = roundoff_of([experiment.native("native_reference").dtype])
        floor = gamma(experiment.terms(), 2.0**-53)
        ratios, floors = [], []
        for ours, theirs in zip(
            experiment.candidate().steps, experiment.control().steps, strict=True
        ):
            for name, sums in ours.gradients.items():
                whole = overall(ours.gradients).reference_norm
                if sums.reference_norm < floor * whole:
                    continue  # zero but for rounding
                control = theirs.gradients[name].difference_norm
                if control:
                    ratios.append(sums.difference_norm / control)
                floors.append(sums.relative / floor)
        return {
            "units": precision.accumulation / unit,
            "worst": precision.units * math.sqrt(k),
            "full": precision.full_batch / unit,
            "ratio": max(ratios, default=0.0),
            "floor": max(floors, default=0.0),
            "beyond": float(precision.accumulation > precision.full_batch > 0.0),
        }
    finally:
        experiment.close()


def table(by: dict[tuple[str, int], list[dict[str, float]]]) -> str:
    """Return the measurements as Markdown."""
    columns = (
        "parameters",
        "K",
        "accumulation, units: median",
        "largest",
        "largest / sqrt(K)",
        "full batch, units",
        "accumulation > full",
        "candidate / control",
        "candidate / gamma(n)",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for (dtype, k), rows in by.items():

        def of(key: str, rows: Any = rows) -> list[float]:
            return [row[key] for row in rows]

        lines.append(
            f"| {dtype} | {k} | {statistics.median(of('units')):.2g} | {max(of('worst')):.2g} "
            f"| {max(of('worst')) / math.sqrt(k):.2g} | {statistics.median(of('full')):.2g} "
            f"| {sum(of('beyond')):.0f} of {len(rows)} | {max(of('ratio')):.2g} "
            f"| {max(of('floor')):.2g} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
