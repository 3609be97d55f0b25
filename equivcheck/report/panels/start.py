"""Where it starts: the difference of every quantity, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.report import words
from equivcheck.report.panels._panel import Panel
from equivcheck.report.scales import Decades

# Kinds of findings, as the line of the chart that shows them.
LINES = {
    "gradients": "gradients",
    "parameters": "parameters",
    "losses": "losses",
    "learning_rates": "learning rates",
    "buffers": "buffers",
    "optimizer_state": "optimizer state",
}
# Of several things that differ at one step, the one to name: what the others follow from.
_ORDER = ("samples", "none", "gradients", "applied", "learning_rates")


def start(case: Mapping[str, Any]) -> Panel:
    """Return the difference of every quantity, step by step, beside the measured noise."""
    steps = case.get("steps")
    if not steps:
        return _start_of_an_old_result(case)
    x = list(steps["optimizer_step"])
    lines = [
        {"name": title, "key": key, "values": list(steps[key]["relative"])}
        for key, title in LINES.items()
        if (steps.get(key) or {}).get("relative")
    ]
    gradients = steps.get("gradients") or {}
    if not x or not lines:
        return None
    noise, allowed = gradients.get("control"), gradients.get("allowed")
    pairs = [
        {"name": title, "full_batch": numbers["full_batch"], "accumulated": numbers["accumulated"]}
        for key, title in (("losses", "loss"), ("learning_rates", "learning rate"))
        if (numbers := steps.get(key))
    ]
    if steps.get("losses"):
        pairs[0]["name"] = f"loss ({steps['losses'].get('source', '')})"
    every = [v for line in lines for v in line["values"]] + list(noise or ())
    return {
        "x": x,
        "of": steps.get("of", len(x)),
        "lines": lines,
        "noise": noise,
        "allowed": allowed,
        "pairs": pairs,
        "axis": Decades.over([*every, *(allowed or ())]),
        "told": _where_it_starts(case, noise),
    }


def _start_of_an_old_result(case: Mapping[str, Any]) -> Panel:
    """Return the findings as points: results of the first version have no more."""
    found: dict[str, dict[int, float]] = {}
    for each in case.get("findings") or ():
        key = words.SHOWN_AS.get(each["kind"])
        step = each.get("optimizer_step")
        if key in LINES and step is not None and step >= 0 and each.get("relative") is not None:
            found.setdefault(key, {})[step] = each["relative"]
    if not found:
        return None
    x = sorted({step for points in found.values() for step in points})
    lines: list[dict[str, Any]] = [
        {"name": LINES[key], "key": key, "values": [points.get(step) for step in x]}
        for key, points in found.items()
    ]
    noise = ((case.get("divergence") or {}).get("gradients") or {}).get("control")
    every = [value for line in lines for value in line["values"]]
    return {
        "x": x,
        "of": len(x),
        "lines": lines,
        "noise": None if noise is None else [noise] * len(x),
        "allowed": None,
        "pairs": [],
        "axis": Decades.over([*every, noise]),
        "told": _where_it_starts(case, None),
    }


def _where_it_starts(case: Mapping[str, Any], noise: Sequence[float | None] | None) -> str:
    quiet = max((n for n in noise or () if n is not None), default=None)
    told = f"; rounding alone makes at most {words.number(quiet)}" if quiet is not None else ""
    findings = [f for f in case.get("findings") or () if (f.get("optimizer_step") or 0) >= 0]
    if not case.get("findings"):
        if any((cause.get("evidence") or {}).get("shared") for cause in case.get("causes") or ()):
            return f"The two runs agree at every optimizer step{told}: the fault is in both."
        if case["verdict"] == "precision-loss":
            return (
                f"In float64 the two runs agree at every optimizer step{told}: it is the same function, "
                "and what accumulating loses as written is rounding."
            )
        return f"The two runs agree at every optimizer step{told}."
    if not findings:
        kinds = sorted({words.SHOWN_AS.get(f["kind"], f["kind"]) for f in case["findings"]})
        return f"{' and '.join(kinds).replace('_', ' ').capitalize()} differ over the run as a whole{told}."
    first = min(
        findings,
        key=lambda f: (f["optimizer_step"], _ORDER.index(f["kind"]) if f["kind"] in _ORDER else 9),
    )
    kind = words.SHOWN_AS.get(first["kind"], first["kind"]).replace("_", " ")
    same = [f for f in findings if f["kind"] == first["kind"]]
    sizes = [f["relative"] for f in same if f.get("relative") is not None]
    if kind == "samples":
        seen = case.get("optimizer_steps_seen") or {}
        mine, theirs = seen.get("accumulated"), seen.get("full_batch")
        steps = (
            f" The accumulated run made {mine} optimizer step{'' if mine == 1 else 's'}, the full batch {theirs}."
            if mine != theirs
            else ""
        )
        return f"From optimizer_step {first['optimizer_step']} on, the two runs consumed other samples{told}.{steps}"
    if kind == "none":
        return f"From optimizer_step {first['optimizer_step']} on, some gradients are absent in one run."
    size = ""
    if sizes:
        low, high = words.number(min(sizes)), words.number(max(sizes))
        size = f" by {low}" if low == high else f" by {low} to {high}"
    where = f"optimizer_step {first['optimizer_step']}"
    where = f"at {where}" if len(same) == 1 else f"from {where} on"
    return f"{kind.capitalize()} differ {where}{size}{told}."
