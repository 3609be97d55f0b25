"""Precision, ranks, control: how the comparison itself was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from equivcheck.report import words
from equivcheck.report.panels._panel import Panel, short
from equivcheck.report.scales import Decades
from equivcheck.result import missing_causes

# `equivcheck.noise.UNITS`, which cannot be had here without torch: beyond it, it is not rounding.
UNITS: Final = 8.0


def precision(case: Mapping[str, Any]) -> Panel:
    """Return the errors of both native runs against float64, as a whole and by module."""
    whole, modules = case.get("precision_loss"), case.get("precision_by_module") or ()
    if not whole and not modules:
        return None
    whole = whole or {}
    values = [whole.get(key) for key in ("full_batch", "accumulated", "accumulation")]
    values += [row.get(key) for row in modules for key in ("full_batch", "accumulated")]
    return {
        "whole": whole,
        "rows": list(modules)[:32],
        "axis": Decades.over(values, low=-9),
        "dtype": case.get("dtype", ""),
        "told": _precision_in_words(case, whole),
    }


def _precision_in_words(case: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    if not whole:
        return "Error of both runs as written, against float64."
    dtype = case.get("dtype", "")
    full, lost = words.number(whole.get("full_batch")), words.number(whole.get("accumulation"))
    told = f"As written ({dtype}), the full batch errs by {full}"
    units = whole.get("units")
    if case["verdict"] == "divergent" and (units or 0) > UNITS:
        # The gradient is no sum of what arrived in its cycle, so the difference is no rounding either.
        told += "."
    elif units is not None:
        told += f"; accumulating itself adds {lost}, {words.times(units)} the roundoff expected at this K."
    else:
        told += f"; accumulating itself adds {lost}."
    if case["verdict"] == "divergent" and (whole.get("accumulated") or 0) > 10 * (
        whole.get("full_batch") or 0
    ):
        return (
            told
            + f" The accumulated run is off by {words.number(whole['accumulated'])}: by the fault, not by rounding."
        )
    if case["verdict"] == "precision-loss":
        return told + " That is more than this precision should lose."
    return told


def ranks(case: Mapping[str, Any]) -> Panel:
    """Return what is known of each rank, and what they sent each other; None with one process."""
    given = case.get("ranks")
    if not given and (case.get("world_size") or 1) < 2:
        return None
    rows = [dict(each) for each in given] if isinstance(given, list) else []
    rows = [each for each in rows if isinstance(each, Mapping)]
    titles = list(dict.fromkeys(key for row in rows for key in row if _flat(row[key])))
    facts = given if isinstance(given, Mapping) else {}
    told = f"{case.get('world_size')} ranks, strategy {case.get('strategy')}."
    sent = _sent(rows)
    return {
        "world_size": case.get("world_size"),
        "strategy": case.get("strategy"),
        "titles": [_RANK_TITLES.get(title, title.replace("_", " ")) for title in titles],
        "rows": [[_of_rank(title, row.get(title)) for title in titles] for row in rows],
        "facts": [(str(k).replace("_", " "), short(v)) for k, v in facts.items() if _flat(v)],
        "sent": sent,
        "told": f"{told} {_sent_in_words(sent)}".strip(),
    }


_RANK_TITLES = {"gradients": "gradients off by"}


def _of_rank(title: str, value: Any) -> str:
    if title == "gradients":
        return words.number(value)
    return f"{value:.2f}" if title == "seconds" and isinstance(value, float) else short(value)


def _sent(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what each rank sent in each optimizer step; equal steps, and equal ranks, in one row."""
    found: list[dict[str, Any]] = []
    for row in rows:
        for each in row.get("collectives") or ():
            kinds = each.get("kinds") or {}
            key = (each.get("count"), each.get("bytes"), sorted(kinds.items()))
            step, rank = each.get("optimizer_step"), row.get("rank")
            same = next((f for f in found if f["key"] == key and rank in f["at"]), None)
            if same is None:
                found.append({"key": key, "at": {rank: [step]}})
            else:
                same["at"][rank].append(step)
    merged: list[dict[str, Any]] = []
    for each in found:
        [(rank, steps)] = each["at"].items()
        same = next((m for m in merged if (m["key"], m["steps"]) == (each["key"], steps)), None)
        if same is None:
            merged.append({"key": each["key"], "steps": steps, "ranks": [rank]})
        else:
            same["ranks"].append(rank)
    return [
        {
            "steps": _runs(each["steps"]),
            "last": each["steps"][-1],
            "several": len(each["steps"]) > 1,
            "ranks": "all" if len(each["ranks"]) == len(rows) else _runs(each["ranks"]),
            "count": each["key"][0],
            "bytes": words.size(each["key"][1] or 0),
            "kinds": ", ".join(
                f"{kind.replace('_', '-')} \N{MULTIPLICATION SIGN} {count}"
                for kind, count in each["key"][2]
            ),
        }
        for each in sorted(merged, key=lambda m: (m["steps"], m["ranks"]))
    ]


def _runs(numbers: Sequence[int]) -> str:
    """Return `0, 2 to 5` for 0 2 3 4 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )


def _sent_in_words(sent: Sequence[Mapping[str, Any]]) -> str:
    if not sent:
        return ""
    if not any(each["count"] for each in sent):
        return "Nothing was sent from one rank to another."
    last = max(sent, key=lambda each: each["last"])  # the first steps set things up
    often = "collective" if last["count"] == 1 else "collectives"
    several = "s" if last["several"] else ""
    return (
        f"In optimizer_step{several} {last['steps']} each rank takes part in {last['count']} {often}, "
        f"{last['bytes']}."
    )


def _flat(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (
        isinstance(value, list)
        and (len(value) > 8 or any(isinstance(x, (list, Mapping)) for x in value))
    )


def control(case: Mapping[str, Any]) -> Panel:
    """Return control, noise and measured difference of every quantity, and the detection power."""
    rows: list[dict[str, Any]] = [
        {
            "name": name.replace("_", " "),
            "measured": numbers.get("relative"),
            "noise": numbers.get("control"),
            "scale": numbers.get("scale"),
            "cosine": numbers.get("cosine"),
            "kind": _kind(case, name, numbers),
        }
        for name, numbers in words.compared(case)
    ]
    power = case.get("detection_power")
    if not rows and power is None:
        return None
    values = [row[key] for row in rows for key in ("measured", "noise")]
    return {
        "rows": rows,
        "power": power,
        "margin": case.get("margin"),
        "kinds": {kind: any(row["kind"] == kind for row in rows) for kind in ("bad", "follows")},
        "axis": Decades.over([*values, power]),
        "told": _control_in_words(case, rows, power),
        "lowered": dict(case.get("lowered") or {}),
        "judged": case.get("judged"),
    }


def _kind(case: Mapping[str, Any], name: str, numbers: Mapping[str, Any]) -> str:
    """Return whether a quantity is within its limit (good), beyond it (bad), or off as a consequence (follows)."""
    if not words.failed(case) and not case.get("causes"):
        return "good"
    if case.get("findings") is None:
        return "bad" if case.get("causes") else "good"
    if any(words.SHOWN_AS.get(f["kind"]) == name for f in case["findings"]):
        return "bad"
    relative, noise = numbers.get("relative"), numbers.get("control") or 0.0
    beyond = relative is None or relative > max(100 * noise, case.get("detection_power") or 1e-9)
    return "follows" if case["findings"] and beyond else "good"


def _control_in_words(
    case: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], power: float | None
) -> str:
    gradients = next((row for row in rows if row["name"] == "gradients"), None)
    told = ""
    if gradients is not None and gradients["noise"] is not None:
        noise = gradients["noise"]
        told = (
            "The full batch with its blocks permuted gives bitwise the same gradients."
            if noise == 0
            else f"The full batch with its blocks permuted differs by {words.number(noise)}: "
            "that is the noise of this code."
        )
    if power is not None:
        told += f" A relative fault of {words.number(power)} would have been seen."
    if case.get("judged") == "native":
        told += " Judged as written, not in float64."
    absent = missing_causes(case)
    if absent:
        told += f" Declared but not found: {', '.join(absent)}."
    return told.strip()
