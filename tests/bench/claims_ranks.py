"""What is claimed of accumulation on several ranks, with counts and bytes: the second half of reports/claims.md.

Made from the rows of the suites of ranks that name a claim, each at one point, and from reports/traffic.json. Results
of `equivcheck run suite:ddp --json PATH` may be given instead of running the rows again.

    python tests/bench/claims_ranks.py [RESULT ...]

R ranks, K accumulation steps, P parameters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from equivcheck import result as results
from equivcheck.api import Job, outcomes, plan
from equivcheck.config import OPTIONS
from equivcheck.report import words
from equivcheck.suite import expanded, read_suite

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "reports" / "claims.md"
TITLE = "## Several ranks\n"
HEAD = (
    "claim",
    "case",
    "found",
    "causes",
    "relative",
    "scale",
    "rows",
    "collectives",
    "bytes",
    "theory",
)
PROSE = """
Rows of the suites of ranks that name a claim, made by `make claims`: relative error and scale of the gradient against
the full batch in one process, the rows that rank 0 takes of those of one update, and what it takes part in during it,
counted by gloo. [traffic.md](traffic.md) has the same for other numbers of ranks and micro-batches.
"""


def witnesses() -> Iterator[tuple[tuple[str, ...], Job]]:
    """Yield a job for each row that names a claim: at K=4 and the fewest ranks that it has, evenly cut."""
    values = {name: option.default for name, option in OPTIONS.items()}
    for target in expanded("suite:ranks"):
        jobs, _ = plan([target], values, explicit=False)
        for name, row in read_suite(target).workloads.items():
            own = [job for job in jobs if job.case.workload == name]
            if row.claims:
                yield row.claims, min(own, key=_distance)


def _distance(job: Job) -> tuple[bool, bool, int]:
    case = job.case
    return case.accumulation_steps != 4, case.split != "even", case.world_size


def line(claims: tuple[str, ...], case: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    shown = [
        ", ".join(claims),
        f"{case['target'].split('/')[-1]} {words.label(case)}",
        case["theory"]["found"],
        " ".join(words.codes(case)) or "-",
        words.number(gradients.get("relative")),
        words.factor(gradients.get("scale")),
        _rows(case),
        *_sent(case),
        case["theory"]["source"].replace("|", "/"),
    ]
    return f"| {' | '.join(shown)} |"


def _rows(case: Mapping[str, Any]) -> str:
    """Return how many rows of the first full batch rank 0 takes, and how many there are."""
    events = [
        [
            e.get("samples", 0)
            for e in run["events"]
            if (e["event"], e["optimizer_step"]) == ("fetch", 0)
        ]
        for run in (case["timelines"]["accumulated"], case["timelines"]["full_batch"])
    ]
    micro, whole = events
    if not micro or not whole:
        return "-"
    shown = f"{micro[0]} x {len(micro)}" if len(set(micro)) == 1 else "+".join(map(str, micro))
    return f"{shown} of {sum(whole)}"


def _sent(case: Mapping[str, Any]) -> tuple[str, str]:
    """Return collectives and bytes of rank 0 in the second optimizer step: the first one sets things up."""
    sent = (case.get("ranks") or [{}])[0].get("collectives") or []
    if not sent:
        return "-", "-"
    step = sent[min(1, len(sent) - 1)]
    kinds = step["kinds"].items()
    told = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in kinds)
    return told or "none", words.size(step["bytes"])


def traffic() -> str:
    """Return the collectives of the usual set-ups at R = 2 and K = 4, from the committed measurements."""
    claims = {"DDP": "C19", "Zero": "C21", "FSDP": "C22, C23"}
    lines = [
        "| claim | loop, R=2, K=4 | all-reduces | all-gathers | broadcasts | bytes per update |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in json.loads((ROOT / "reports" / "traffic.json").read_text(encoding="utf-8")):
        if (row["world_size"], row["accumulation_steps"]) != (2, 4):
            continue
        claim = next(code for start, code in claims.items() if row["loop"].startswith(start))
        whole = 4 * row["parameters"]
        found = [
            row["collectives"].get(kind, (0, 0))
            for kind in ("all_reduce", "all_gather", "broadcast")
        ]
        cells = [f"{count} ({size / whole:.2g} P)" if count else "0" for count, size in found]
        total = sum(size for _, size in row["collectives"].values())
        lines.append(f"| {claim} | {row['loop']} | {' | '.join(cells)} | {total} |")
    return "\n".join(lines)


def _misses(wrong: list[str]) -> str:
    """Return the rows that were not found as theory says: they bear witness to nothing yet."""
    return "Not found as theory says:\n\n" + "\n".join(wrong) + "\n\n" if wrong else ""


def main(paths: list[str]) -> int:
    """Write the half of the page; 1 if a row is not as theory says."""
    known = {case["id"]: case for path in paths for case in results.load(path)["cases"]}
    rows, wrong = [], []
    for claims, job in witnesses():
        case = known.get(job.case.id)
        if case is None:
            [case] = outcomes([job])
        if case["theory"]["met"]:
            rows.append((int(claims[0][1:]), line(claims, case)))
        else:
            name = f"{job.case.target} {job.case.label}"
            wrong.append(f"- {', '.join(claims)}: {name} was found {words.headline(case)}")
    page = PAGE.read_text(encoding="utf-8").split(TITLE)[0].rstrip()
    table = "\n".join(shown for _, shown in sorted(rows))
    head = f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}"
    told = f"{page}\n\n{TITLE}{PROSE}\n{head}\n{table}\n\n{_misses(wrong)}{traffic()}\n"
    PAGE.write_text(told, encoding="utf-8")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
