"""Check generated correct loops; `make search` runs it in pieces.

    python tests/bench/generated.py correct --count 500 --seed 0 --out reports/latest/generated.jsonl
    python tests/bench/generated.py table reports/latest/generated.jsonl

Every piece adds one line of JSON: its seed, its count, its time, and each case that was not as it should be, written
as the call that makes its subject.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from equivcheck import strategies
from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

# Accumulating in bfloat16 parameters loses more than the full batch has from here on (README, How the limits were set).
LOSS_FROM = 8


@st.composite
def points(draw):
    """Draw a correct loop and a cut that fits its batches."""
    loop = draw(strategies.loops())
    return loop, draw(strategies.cuts(loop.batches))


def is_right(loop, cut, case):
    """Return whether a correct loop got its verdict."""
    allowed = {"equivalent"}
    if loop.precision == "bfloat16" and cut.accumulation_steps >= LOSS_FROM:
        allowed.add("precision-loss")
    return case["verdict"] in allowed


def correct(count, number):
    """Return what `count` generated correct cases gave."""
    wrong, verdicts = [], Counter()
    started, cpu = time.perf_counter(), time.process_time()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(points())
    def run(point):
        loop, cut = point
        case = run_case(load_subject(loop), Case(repr(loop), **cut.keywords))
        verdicts[case["verdict"]] += 1
        if not is_right(loop, cut, case):
            wrong.append(
                {
                    "loop": repr(loop),
                    "cut": repr(cut),
                    "verdict": case["verdict"],
                    "headline": case["headline"],
                    "notes": case["notes"],
                }
            )

    run()
    return {
        "what": "correct",
        "seed": number,
        "cases": sum(verdicts.values()),
        "verdicts": dict(verdicts),
        "wrong": wrong,
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }


def table(paths):
    """Print the totals of all pieces."""
    lines = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    right = [line for line in lines if line["what"] == "correct"]
    total = sum(line["cases"] for line in right)
    verdicts = sum((Counter(line["verdicts"]) for line in right), Counter())
    print(
        f"{total} correct cases, seeds {min(x['seed'] for x in right)} to"
        f" {max(x['seed'] for x in right)}: {dict(verdicts)},"
        f" {sum(len(x['wrong']) for x in right)} false alarms,"
        f" {sum(x['cpu_seconds'] for x in right):.0f} s of CPU time"
    )
    for line in right:
        for each in line["wrong"]:
            print(json.dumps(each))


def main():
    """Run one piece."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["correct", "table"])
    parser.add_argument("paths", nargs="*")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pieces", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "table":
        table(options.paths)
        return
    for number in range(options.seed, options.seed + options.pieces):
        found = correct(options.count, number)
        print(json.dumps(found), file=sys.stderr)
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
