"""Check generated correct loops; `make search` runs it in pieces.

    python tests/bench/generated.py correct --count 500 --seed 0 --out reports/latest/generated.jsonl
    python tests/bench/generated.py table reports/latest/generated.jsonl
    python tests/bench/generated.py mutants --seed 0 --out reports/search.json

Every piece adds one line of JSON: its seed, its count, its time, and each case that was not as it should be, written
as the call that makes its subject; a seed that the file has already is not run again. `mutants` draws cases of every
mutant of one process, any rows of its batches under any cut, until its causes are named, and writes how many it took.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
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
from equivcheck.feed import read_batches
from equivcheck.search import Search
from equivcheck.subject import load_subject

ROOT = Path(__file__).parents[2]
MUTANTS = ROOT / "fixtures" / "mutants"
LIMIT = 100

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


def searched(path, number):
    """Return how many drawn cases it took until a mutant's causes were named."""
    subject = load_subject(str(path))
    stated = vars(sys.modules[subject.fresh().train.__module__])
    sizes = read_batches(subject.fresh().batches, 8).rows
    search = Search(subject, Case(str(path.relative_to(ROOT)), 1), sizes, ())
    line = {"mutant": path.stem, "expect": list(stated["EXPECT"]), "cases": 0, "found": None}
    others = Counter()
    rng = random.Random(number)  # noqa: S311 - a choice of cases, no secret
    for point in itertools.islice(search.drawn(rng), 10 * LIMIT):
        if point in search.ran or search.run(point) is None:
            continue  # drawn before, or no case of the contract
        case = search.run(point)
        line["cases"] += 1
        codes = {cause["code"] for cause in case["causes"]}
        if set(line["expect"]) <= codes:
            how = ("rows", "accumulation_steps", "split")
            line["found"] = {name: case[name] for name in how}
            break
        others.update(codes)
        if line["cases"] == LIMIT:
            break
    return {**line, "others": dict(others), "seed": number}


def mutants(numbers, out):
    """Search all mutants with each seed and write what it took, and a page of it beside."""
    lines = []
    for path in sorted(MUTANTS.glob("eq*.py")):
        lines.append([searched(path, number) for number in numbers])
        print(json.dumps(lines[-1]), file=sys.stderr)
        if out:
            out.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
            out.with_suffix(".md").write_text(report(lines, numbers), encoding="utf-8")


def report(lines, numbers):
    """Return the numbers as Markdown."""
    took = sorted(each["cases"] for line in lines for each in line if each["found"])
    all_found = sum(all(each["found"] for each in line) for line in lines)
    shown = [
        "# Generated cases until a mutant is found",
        "",
        "Made by `make search-mutants`: rows of each mutant's batches, K and cut are drawn (one to three optimizer",
        "steps, tails among them) until its causes are named, with each of the seeds",
        f"{', '.join(map(str, numbers))}; at most {LIMIT} cases each, torch {torch.__version__}.",
        f"{all_found} of {len(lines)} mutants are found with every seed.",
        f"It takes {took[len(took) // 2]} cases in the median, {took[-1]} at most.",
        "",
        "| code | mutant | cases, seed by seed | first found at | also named before |",
        "| --- | --- | --- | --- | --- |",
    ]
    for line in lines:
        how = line[0]["found"]
        place = (
            f"K={how['accumulation_steps']} {how['split']}, rows {how['rows']}" if how else "never"
        )
        others = sum((Counter(each["others"]) for each in line), Counter())
        cases = " ".join(str(each["cases"]) if each["found"] else "never" for each in line)
        cells = [
            " ".join(line[0]["expect"]),
            line[0]["mutant"].partition("_")[2],
            cases,
            place,
            ", ".join(f"{code} ({times})" for code, times in others.items()) or "-",
        ]
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown) + "\n"


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
    parser.add_argument("what", choices=["correct", "mutants", "table"])
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
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.what == "mutants":
        mutants(range(options.seed, options.seed + options.pieces), options.out)
        return
    there = options.out.read_text(encoding="utf-8") if options.out and options.out.exists() else ""
    done = {json.loads(line)["seed"] for line in there.splitlines()}
    for number in range(options.seed, options.seed + options.pieces):
        if number in done:
            continue
        found = correct(options.count, number)
        print(json.dumps(found), file=sys.stderr)
        if options.out:
            with options.out.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
