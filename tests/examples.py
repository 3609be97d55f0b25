"""`python tests/examples.py` rewrites reports/examples; with `--check` it compares instead.

One result and one page per cause, from the first mutant that shows it best, and an index. Faults between ranks run on
two, by the strategy that their file states.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

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
    "EQ309": "eq309_averaged_model",
    "EQ501": "eq501_token_mean_per_rank",
    "EQ502": "eq502_no_sync_to_the_end",
    "EQ503": "eq503_forward_outside_no_sync",
    "EQ504": "eq504_global_count_averaged",
    "EQ505": "eq505_other_learning_rate",
    "EQ506": "eq506_fsdp2_local_norm",
    "EQ507": "eq507_scheduler_per_rank",
    "EQ508-ranks": "eq508_used_in_the_first_micro_batch",
}
RANKS = 2  # enough for every fault between ranks, and all that two cores run at once
SEVERAL = (
    *("fixtures/trainers/plain_mean.py", "fixtures/trainers/clipped.py"),
    *("fixtures/mutants/eq101_missing_division_plain.py", "fixtures/mutants/eq306_clip_by_norm.py"),
)


class Example(NamedTuple):
    """What is run for one page.

    Attributes:
        targets: Files of subjects.
        options: Keywords of `equivcheck.measure`.
    """

    targets: list[str]
    options: dict[str, Any]


def examples() -> dict[str, Example]:
    """Return every example by its name: the code of its cause, first."""
    mutants = ROOT / "fixtures" / "mutants"
    alone = _by_code(mutants.glob("eq*.py"))
    together = _by_code((mutants / "ranks").glob("eq5*.py"), taken=alone)
    found = {code: Example([_name(path)], {}) for code, path in alone.items()}
    found |= {
        code: Example([_name(path)], {"world_size": RANKS, "strategy": strategy_of(path)})
        for code, path in together.items()
    }
    right = "fixtures/trainers/token_weighted.py", "fixtures/trainers/ddp/token_weighted.py"
    return {
        **found,
        "equivalent": Example([right[0]], {}),
        "equivalent-ranks": Example([right[1]], {"world_size": RANKS, "strategy": "ddp"}),
        "several": Example(list(SEVERAL), {"accumulation_steps": (2, 4)}),
    }


def _by_code(paths: Iterable[Path], taken: Collection[str] = ()) -> dict[str, Path]:
    """Return the first file of each code, or the one that shows it best; `-ranks` follows a code that is taken."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        code = path.name[:5].upper()
        name = f"{code}-ranks" if code in taken else code
        if name not in found or BEST.get(name) == path.stem:
            found[name] = path
    return found


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def strategy_of(path: Path) -> str:
    """Return how the ranks of a mutant work together, as its file states it."""
    stated = re.search(r'^STRATEGY = "(\w+)"$', path.read_text(encoding="utf-8"), re.MULTILINE)
    assert stated is not None, path
    return stated[1]


def result_of(example: Example) -> dict:
    """Run one example."""
    from equivcheck import measure, result

    options = {"accumulation_steps": 4} | example.options
    runs = [measure(each, **options) for each in example.targets]
    cases = [case for run in runs for case in run.cases]
    whole = result.assemble(cases, target=" ".join(example.targets))
    for case in whole["cases"]:
        case["seconds"] = round(case.get("seconds") or 0.0, 1)
        for each in (*(case.get("runs") or ()), *(case.get("ranks") or ())):
            each["seconds"] = round(each["seconds"], 2)
    return json.loads(result.to_json(whole))


# Beside numbers of order 1, float64 says no more than that it is rounding.
ROUNDING = 1e-12
# The numbers of a cause, to two digits: processors draw and round initial weights otherwise.
SAME = 0.02


def steady(whole: dict[str, Any]) -> dict[str, Any]:
    """Return what is the same on every machine: verdicts, causes with their proofs, and which keys there are.

    Processors draw other initial weights and round otherwise, so the remaining numbers are theirs.
    """
    return {
        "keys": sorted(set(_keys(whole))),
        "cases": [
            {
                "verdict": case["verdict"],
                # Code that does not repeat itself gives other numbers every time; its cause is the same.
                "causes": [cause["code"] for cause in case["causes"]]
                if case["verdict"] == "inconclusive"
                else case["causes"],
            }
            for case in whole["cases"]
        ],
    }


def _keys(value: object, place: str = "") -> Iterable[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{place}.{key}"
            yield from _keys(item, f"{place}.{key}")
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item, f"{place}[]")


def apart(told: object, found: object, place: str = "") -> str | None:
    """Return where two steady results first differ, as a path of keys; None where they do not."""
    if isinstance(told, dict) and isinstance(found, dict) and told.keys() == found.keys():
        pairs = [(f"{place}.{key}", told[key], found[key]) for key in told]
    elif isinstance(told, list) and isinstance(found, list) and len(told) == len(found):
        pairs = [(f"{place}[{i}]", *both) for i, both in enumerate(zip(told, found, strict=True))]
    elif isinstance(told, float) and isinstance(found, float):
        same = math.isclose(told, found, rel_tol=SAME, abs_tol=ROUNDING)
        return None if same else f"{place}: {told:.3g} -> {found:.3g}"
    elif isinstance(told, list) and isinstance(found, list) and told and isinstance(told[0], str):
        return f"{place}: without {sorted(set(told) - set(found))}, with {sorted(set(found) - set(told))}"
    else:
        return (
            None
            if told == found
            else f"{place or 'the top'}: {str(told)[:60]} -> {str(found)[:60]}"
        )
    return next((each for pair in pairs if (each := apart(pair[1], pair[2], pair[0]))), None)


def main(arguments: list[str]) -> int:
    """Rewrite or compare the examples; 1 if any differs."""
    from equivcheck import result
    from equivcheck.report import html, index

    os.chdir(ROOT)
    check = "--check" in arguments
    wanted = [name for name in arguments if not name.startswith("-")]
    different = []
    for name, example in examples().items():
        if wanted and name not in wanted:
            continue
        found = result_of(example)
        path = EXAMPLES / f"{name}.json"
        if check:
            told = result.load(path)
            place = apart(steady(told), steady(found))
            if place is not None:
                different.append(f"{name} (at {place})")
            continue
        result.write(path, found)
        result.write_text(path.with_suffix(".html"), html.render(found))
    if not check:
        known = {name: result.load(EXAMPLES / f"{name}.json") for name in sorted(examples())}
        result.write_text(
            EXAMPLES / "index.html",
            index.page({f"{name}.html": each for name, each in known.items()}),
        )
    if different:
        print(f"make examples gives others: {', '.join(different)}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
