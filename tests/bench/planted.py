"""Put trainers with one planted fault each under all suites: they fail where that fault matters, and nowhere else.

    python tests/bench/planted.py [-j 2] [--resume] [--only no_division]

Writes the results to reports/latest/planted_NAME.json, and reports/planted.md. What has to fail is computed here, in
plain torch, from each workload: by which factor the fault weighs a micro-batch, which rates a schedule gives, whether
a clip acts on a part of the cycle. Exits with 1 where a suite says otherwise.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from equivcheck import result as results
from equivcheck.feed import read_batches
from equivcheck.split import plan, take, walk
from equivcheck.subject import Code
from equivcheck.suite import bundled, read_suite
from equivcheck.workload import load_workload

ROOT = Path(__file__).parents[2]
LATEST = ROOT / "reports" / "latest"
PAGE = ROOT / "reports" / "planted.md"
TRAINERS = bundled("fixtures") / "suite_trainers"
FAULTS = {
    "right": "standard.py:train",
    "no_division": "planted.py:no_division",
    "mean_of_means": "planted.py:mean_of_means",
    "clip": "planted.py:clip",
    "schedule": "planted.py:schedule",
}
SAID = {
    "right": "none: the correct loop",
    "no_division": "the means of the micro-batches are summed, not averaged",
    "mean_of_means": "they are averaged, whatever each holds",
    "clip": "the gradients are clipped after every micro-batch",
    "schedule": "the schedule advances with every micro-batch",
}


def trainer(fault: str) -> str:
    """Return the address of a trainer, as `--train` takes it."""
    return f"{TRAINERS}/{FAULTS[fault]}"


# ---- what has to fail --------------------------------------------------------------------------


def has_to_fail(fault: str, case: Mapping[str, Any]) -> bool | None:
    """Return whether theory is not met under a fault; None where the case cannot be decided anyhow.

    Args:
        fault: A name out of FAULTS.
        case: Fields of a case of a suite, and its theory.
    """
    if fault == "right" or case["theory"]["verdict"] == "error":  # the model itself raises
        return False
    code = _code(case["target"], case["workload"])
    cycles = list(_cycles(code, case))
    if fault in ("no_division", "mean_of_means"):
        matters = any(_weighs(code.offers["loss"], cycle, fault) for cycle in cycles)
    elif fault == "clip":
        matters = _clips_a_part(code, cycles)
    else:
        matters = _advances_too_far(code, case, cycles)
    # Where rows interact, equal parts of a mean are taken for right too: the full batch shows no weights.
    either = fault == "mean_of_means" and "EQ202" in case["theory"]["causes"]
    undecided = case["theory"]["verdict"] == "inconclusive" or either
    return None if matters and undecided else matters


@cache
def _code(target: str, workload: str) -> Code:
    return load_workload(target, workload, trainer("right")).fresh()


def _cycles(code: Code, case: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Yield the micro-batches of each optimizer step."""
    data = read_batches(code.batches, case["optimizer_steps"])
    cuts = plan(data.rows, case["accumulation_steps"], case["split"])
    for batch, [spans] in zip(data.batches, cuts, strict=True):
        yield [take(batch, slice(*span)) for span in spans]


def _weighs(loss: Any, cycle: list[Any], fault: str) -> bool:
    """Return whether a micro-batch's own mean, divided or not, differs from its share of the cycle's mean."""
    divisor = len(cycle) if fault == "mean_of_means" else 1
    if type(loss).__name__ == "Sum":  # nothing divides it
        return divisor != 1
    counts = [torch.as_tensor(loss.count(batch), dtype=torch.float64) for batch in cycle]
    total = torch.stack(counts).sum(0)
    return any(not torch.allclose(total, each * divisor, rtol=1e-9) for each in counts)


def _clips_a_part(code: Code, cycles: list[list[Any]]) -> bool:
    """Return whether the gradient of a part of any cycle is longer than the threshold."""
    loss, max_norm = code.offers["loss"], code.offers["max_norm"]
    if max_norm is None:
        return False
    torch.manual_seed(0)
    model = code.build().double()
    stepper = code.offers["optimizer"](model.parameters())  # type: ignore[operator]
    for cycle in cycles:
        count = sum(loss.count(batch) for batch in cycle)  # type: ignore[attr-defined]
        for index, batch in enumerate(cycle):
            loss(model, walk(_double, "", batch), count).backward()  # type: ignore[operator]
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if index < len(cycle) - 1 and norm > max_norm:
                return True
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # type: ignore[arg-type]
        stepper.step()
        stepper.zero_grad()
    return False


def _double(_path: str, leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf


def _advances_too_far(code: Code, case: Mapping[str, Any], cycles: list[list[Any]]) -> bool:
    """Return whether an update has another rate when the schedule advances with every micro-batch."""
    row = read_suite(case["target"]).workloads[case["workload"]]
    if row.scheduler is None:
        return False
    if "ReduceLROnPlateau" in row.scheduler.address:
        return True  # K shares for one loss: it waits K times as short
    right = _rates(code, [1] * len(cycles))
    return _rates(code, list(map(len, cycles))) != right


def _rates(code: Code, advances: list[int]) -> list[list[float]] | None:
    """Return the rates of each update; None if the schedule refuses to go on."""
    stepper = code.offers["optimizer"](code.build().parameters())  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # steps of the schedule without one of the optimizer
        schedule = code.offers["scheduler"](stepper, len(advances))  # type: ignore[operator]
        found = []
        for times in advances:
            try:
                for _ in range(times - 1):
                    schedule.step()
                found.append([round(group["lr"], 12) for group in stepper.param_groups])
                schedule.step()
            except ValueError:
                return None
    return found


# ---- what does fail ----------------------------------------------------------------------------


def disagreements(fault: str, cases: list[Mapping[str, Any]]) -> list[str]:
    """Return a line for each case that fails and should not, or the reverse."""
    found = []
    for case in cases:
        expected = has_to_fail(fault, case)
        if expected is not None and expected is case["theory"]["met"]:
            codes = " ".join(cause["code"] for cause in case["causes"]) or "-"
            found.append(
                f"{fault}: {case['target']} {case['workload']} K={case['accumulation_steps']}"
                f" {case['split']}: {case['theory']['found']} {codes},"
                f" {'has to fail' if expected else 'must not fail'}"
            )
    return found


def run(fault: str, arguments: list[str], targets: list[str]) -> Path:
    """Run the suites under a trainer and return where the result is."""
    path = LATEST / f"planted_{fault}.json"
    command = [sys.executable, "-m", "equivcheck", "run", *targets, "--train", trainer(fault)]
    subprocess.run([*command, "--json", str(path), "-q", *arguments], cwd=ROOT, check=False)
    return path


def page(found: Mapping[str, list[Mapping[str, Any]]], select: str | None = None) -> str:
    """Return the table of suites against faults: failed cases of all, or of those that were selected."""
    suites = sorted({case["target"] for cases in found.values() for case in cases})
    lines = [
        "# Trainers with a planted fault under all suites",
        "",
        "Made by `make planted`: failed cases of all, suite by suite. Which cases have to fail is computed from each",
        "workload in plain torch (`tests/bench/planted.py`), and these are exactly the ones that do. Where rows",
        "interact, the full batch shows no weights, and equal parts of a mean are not held against a loop.",
        *([f"Here of the cases that `-k '{select}'` takes."] if select else []),
        "",
        "| suite | " + " | ".join(found) + " |",
        "| --- |" + " ---: |" * len(found),
    ]
    for suite in suites:
        cells = []
        for cases in found.values():
            own = [case for case in cases if case["target"] == suite]
            failed = sum(not case["theory"]["met"] for case in own)
            cells.append(f"{failed} of {len(own)}" if failed else f"- of {len(own)}")
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {name}: {SAID[name]}" for name in found)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run all of it and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=["suite:all"])
    parser.add_argument("-j", default="2")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("-k", dest="select", help="only some cases; the page says so")
    parser.add_argument("--only", action="append", choices=list(FAULTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    arguments = ["-j", options.j, *(["--resume"] if options.resume else [])]
    arguments += ["-k", options.select] if options.select else []
    found = {}
    for fault in options.only or FAULTS:
        found[fault] = results.load(run(fault, arguments, options.targets))["cases"]
    wrong = [line for fault, cases in found.items() for line in disagreements(fault, cases)]
    print(page(found, options.select))
    print("\n".join(wrong))
    if options.targets == ["suite:all"] and not options.only and not wrong:
        PAGE.write_text(page(found, options.select), encoding="utf-8")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
