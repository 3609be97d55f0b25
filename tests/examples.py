"""`python tests/examples.py` rewrites reports/examples; with `--check` it compares instead, times and noise apart.

One result and one page per cause, from the first mutant that shows it best, and an index.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "reports" / "examples"

# Of several mutants of one cause, the one that reads best; otherwise the first.
BEST = {
    "EQ000": "eq000_one_weight_float32",
    "EQ101": "eq101_missing_division_plain",
    "EQ103": "eq103_mean_of_means_tokens",
    "EQ104": "eq104_one_token_too_many",
    "EQ301": "eq301_zero_grad_in_cycle",
    "EQ307": "eq307_scheduler_per_micro_batch",
}
SEVERAL = (
    *("fixtures/trainers/plain_mean.py", "fixtures/trainers/clipped.py"),
    *("fixtures/mutants/eq101_missing_division_plain.py", "fixtures/mutants/eq306_clip_by_norm.py"),
)


def targets() -> dict[str, list[str]]:
    """Return the targets of every example by its name."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "fixtures" / "mutants").glob("eq*.py")):
        code = path.name[:5].upper()
        if code not in found or BEST.get(code) == path.stem:
            found[code] = [str(path.relative_to(ROOT))]
    return {
        **found,
        "equivalent": ["fixtures/trainers/token_weighted.py"],
        "several": list(SEVERAL),
    }


def result_of(name: str, chosen: list[str]) -> dict:
    """Run one example."""
    from equivcheck import measure, result

    steps = (2, 4) if name == "several" else (4,)
    runs = [measure(each, accumulation_steps=steps) for each in chosen]
    cases = [case for run in runs for case in run.cases]
    whole = result.assemble(cases, target=" ".join(chosen))
    for case in whole["cases"]:
        case["seconds"] = round(case.get("seconds") or 0.0, 1)
        for each in case.get("runs") or ():
            each["seconds"] = round(each["seconds"], 2)
    return json.loads(result.to_json(whole))


def steady(value: object) -> object:
    """Return a result without what differs from machine to machine: times, versions, and noise."""
    if isinstance(value, dict) and value.get("verdict") == "inconclusive" and "causes" in value:
        # Code that does not repeat itself gives other numbers every time; its cause is the same.
        return [cause["code"] for cause in value["causes"]]
    if isinstance(value, dict):
        apart = {
            "seconds",
            "environment",
            "runs",
            "estimate",
            "cells",
            "multiple",
            "margin",
            "noise",
        }
        return {key: steady(item) for key, item in value.items() if key not in apart}
    if isinstance(value, list):
        return [steady(item) for item in value]
    if isinstance(value, float):
        return 0.0 if abs(value) < 1e-7 else float(f"{value:.2g}")
    return value


def main(arguments: list[str]) -> int:
    """Rewrite or compare the examples; 1 if any differs."""
    from equivcheck import result
    from equivcheck.report import html, index

    os.chdir(ROOT)
    check = "--check" in arguments
    wanted = [name for name in arguments if not name.startswith("-")]
    different = []
    for name, chosen in targets().items():
        if wanted and name not in wanted:
            continue
        found = result_of(name, chosen)
        path = EXAMPLES / f"{name}.json"
        if check:
            told = steady(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
            if told != steady(found):
                different.append(name)
            continue
        result.write(path, found)
        result.write_text(path.with_suffix(".html"), html.render(found))
    if not check:
        known = {p.stem: result.load(p) for p in sorted(EXAMPLES.glob("*.json"))}
        result.write_text(
            EXAMPLES / "index.html",
            index.page({f"{name}.html": each for name, each in known.items()}),
        )
    if different:
        print(f"make examples gives others: {', '.join(different)}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
