"""What each panel of a page shows of one case: plain data, with the conclusion in words.

A panel whose data an older result does not have is None, and the page leaves it out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.causes import CAUSES, name_of
from equivcheck.report import words
from equivcheck.report.scales import Decades
from equivcheck.result import missing_causes

Panel = dict[str, Any] | None
CALLS = {
    "zero_grad": "zero_grad",
    "cleared": "gradients cleared",
    "edited": "gradients changed",
    "unscale": "unscale",
    "clip": "clip",
    "step": "step",
    "skipped": "step skipped",
    "scheduler": "scheduler",
    "scaler": "scaler update",
    "parameters_changed": "parameters changed",
    "leftover": "old gradients left",
    "repeat": "closure again",
}
# Of several things that differ at one step, the one to name: what the others follow from.
_ORDER = ("samples", "none", "gradients", "applied", "learning_rates")
# Kinds of findings, as the line of the chart that shows them.
LINES = {
    "gradients": "gradients",
    "parameters": "parameters",
    "losses": "losses",
    "learning_rates": "learning rates",
    "buffers": "buffers",
    "optimizer_state": "optimizer state",
}


def of(case: Mapping[str, Any]) -> dict[str, Panel]:
    """Return all panels of a case by name, in the order of the page."""
    return {
        "start": start(case),
        "weights": weights(case),
        "walk": walk(case),
        "parameters": parameters(case),
        "precision": precision(case),
        "ranks": ranks(case),
        "control": control(case),
    }


# ---- verdict and causes ------------------------------------------------------------------------


def ruler(case: Mapping[str, Any]) -> Panel:
    """Return the measured difference beside the noise, and what is left when the cause is put right."""
    far = words.farthest(case)
    if far is None:
        return None
    name, relative = far
    numbers = (case.get("divergence") or {}).get(name) or {}
    noise, power = numbers.get("control"), case.get("detection_power")
    after = next(
        (p["after"] for c in case.get("causes") or () if (p := proof(c)) and p["after"] is not None),
        None,
    )
    axis = Decades.over([relative, noise, power, after])
    return {
        "axis": axis,
        "name": name.replace("_", " "),
        "noise": noise,
        "limit": power if name == "gradients" else None,
        "measured": relative,
        "after": after,
        "good": not words.failed(case),
    }


def proof(cause: Mapping[str, Any]) -> Panel:
    """Return the divergence before and after the intervention; None if the proof is of another kind."""
    done = (cause.get("evidence") or {}).get("intervention")
    if not isinstance(done, Mapping):
        return None
    before, after = done.get("relative_before"), done.get("relative_after")
    if before is None and after is None:
        return None
    return {
        "axis": Decades.over([before, after]),
        "before": before,
        "after": after,
        "put_right": words.put_right(done.get("put_right") or ()),
    }


def causes(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the causes of a case, each with everything that speaks for it."""
    found = []
    for cause in case.get("causes") or ():
        entry = CAUSES.get(cause["code"])
        found.append(
            {
                "code": cause["code"],
                "name": cause.get("name") or name_of(cause["code"]),
                "status": cause.get("status") or "suspected",
                "step": cause.get("optimizer_step"),
                "because": words.sentence(words.because(cause)),
                "fix": words.fix(cause),
                "proof": proof(cause),
                "facts": words.arguments(case, cause),
                "pairs": [pair for pair in words.facts(cause) if pair[0] != "ruled out"],
                "summary": entry.summary if entry else "",
                "mathematics": entry.mathematics if entry else "",
                "proved_by": entry.proved if entry else "",
                "seen": entry.seen_in_the_wild if entry else (),
                "ruled_out": list((cause.get("evidence") or {}).get("ruled_out") or ()),
            }
        )
    return found


# ---- where it starts ---------------------------------------------------------------------------


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
    lines = [
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
    told = f"; rounding alone makes {words.number(quiet)}" if quiet is not None else ""
    findings = [f for f in case.get("findings") or () if (f.get("optimizer_step") or 0) >= 0]
    if not case.get("findings"):
        if words.failed(case):
            return f"The two runs agree at every optimizer step{told}: the fault is in both."
        return f"The two runs agree at every optimizer step{told}."
    if not findings:
        kinds = sorted({words.SHOWN_AS.get(f["kind"], f["kind"]) for f in case["findings"]})
        return f"{' and '.join(kinds).replace('_', ' ').capitalize()} differ over the run as a whole{told}."
    first = min(findings, key=lambda f: (f["optimizer_step"], _ORDER.index(f["kind"]) if f["kind"] in _ORDER else 9))
    kind = words.SHOWN_AS.get(first["kind"], first["kind"]).replace("_", " ")
    same = [f for f in findings if f["kind"] == first["kind"]]
    sizes = [f["relative"] for f in same if f.get("relative") is not None]
    if kind == "samples":
        said = "samples are matched otherwise: optimizer steps consumed other samples"
        return f"From optimizer_step {first['optimizer_step']} on, {said}{told}."
    if kind == "none":
        return (
            f"From optimizer_step {first['optimizer_step']} on, some gradients are absent in one run."
        )
    size = ""
    if sizes:
        low, high = words.number(min(sizes)), words.number(max(sizes))
        size = f" by {low}" if low == high else f" by {low} to {high}"
    where = f"optimizer_step {first['optimizer_step']}"
    where = f"at {where}" if len(same) == 1 else f"from {where} on"
    return f"{kind.capitalize()} differ {where}{size}{told}."


# ---- weights -----------------------------------------------------------------------------------


def weights(case: Mapping[str, Any]) -> Panel:
    """Return what each micro-batch should count and what it counts, per rank."""
    attribution = case.get("attribution") or {}
    theory, found = (attribution.get(f"{role}_weights") for role in ("reference", "candidate"))
    if not theory or not found:
        return None
    theories, founds = _by_rank(theory), _by_rank(found)
    if len(theories) == 1 and len(founds) > 1:
        theories = theories * len(founds)
    known = [abs(v) for row in (*theories, *founds) for v in row if v is not None]
    top = max(known, default=1.0) or 1.0
    rows = []
    for rank, (wanted, got) in enumerate(zip(theories, founds, strict=False)):
        bars = [
            {
                "micro_step": k,
                "theory": v,
                "found": w,
                "theory_size": _share(v, top),
                "found_size": _share(w, top),
                "ratio": w / v if v and w is not None else None,
            }
            for k, (v, w) in enumerate(zip(wanted, got, strict=False))
        ]
        rows.append({"rank": rank, "bars": bars})
    residuals = {
        role: attribution.get(f"{role}_residual") for role in ("reference", "candidate")
    }
    counts = _counts(case, theories)
    return {
        "rows": rows,
        "ranks": len(rows),
        "step": attribution.get("optimizer_step"),
        "counts": counts,
        "later": [
            each
            for each in case.get("attributions") or ()
            if each.get("optimizer_step") != attribution.get("optimizer_step")
        ],
        "residuals": residuals,
        "module": _first_module(case),
        "told": _weights_in_words(rows, residuals, counts, _resolution(case)),
    }


def _by_rank(values: Sequence[Any]) -> list[list[Any]]:
    return [list(row) for row in values] if isinstance(values[0], list) else [list(values)]


def _share(value: float | None, top: float) -> float:
    return 0.0 if value is None else round(100 * min(abs(value) / top, 1.0), 2)


def _counts(case: Mapping[str, Any], theories: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return what the micro-batches hold; `followed` marks what the full batch's weights follow."""
    held = (case.get("micro_batches") or {}).get("counts") or {}
    flat = [v for row in theories for v in row]
    found = []
    for label, values in held.items():
        numbers = [v for row in values for v in row] if _nested(values) else list(values)
        followed = len(set(numbers)) > 1 and _proportional(flat, numbers)
        if label == "rows" or followed:
            found.append({"label": label, "values": numbers, "followed": followed})
    return found


def _nested(values: Sequence[Any]) -> bool:
    return bool(values) and isinstance(values[0], list)


def _proportional(weights_found: Sequence[Any], counts: Sequence[Any]) -> bool:
    if len(weights_found) != len(counts) or not all(counts) or None in weights_found:
        return False
    ratios = [v / n for v, n in zip(weights_found, counts, strict=True)]
    return max(ratios) - min(ratios) <= 1e-9 * max(map(abs, ratios))


def _resolution(case: Mapping[str, Any]) -> float:
    """Return how fine weights are known: some times the detection power; coarse where that is unknown."""
    power = case.get("detection_power")
    return max(1e-12, 10 * power) if power is not None else 1e-6


def _weights_in_words(
    rows: Sequence[Mapping[str, Any]],
    residuals: Mapping[str, float | None],
    counts: Sequence[Mapping[str, Any]],
    fine: float,
) -> str:
    bars = [bar for row in rows for bar in row["bars"]]
    outside = [role for role, size in residuals.items() if size is not None and size > fine]
    if "reference" in outside:
        told = (
            "The full batch's gradient is no sum of what its micro-batches give alone "
            f"(residual {words.number(residuals['reference'])}): samples act on one another."
        )
    elif "candidate" in outside:
        told = (
            "The accumulated gradient is no sum of what its micro-batches give alone "
            f"(residual {words.number(residuals['candidate'])}): something changed within the cycle."
        )
    else:
        told = _ratios_in_words(bars, fine, several=len(rows) > 1)
    followed = next((c["label"] for c in counts if c["followed"]), None)
    if followed:
        told += f" The right weights follow the count of {followed}."
    return told


def _ratios_in_words(
    bars: Sequence[Mapping[str, Any]], fine: float, *, several: bool
) -> str:
    ratios = [bar["ratio"] for bar in bars]
    known = [r for r in ratios if r is not None]
    if not known:
        return "The weights are not determined: the micro-batches' gradients are not independent."
    if all(abs(r - 1) <= fine for r in known):
        return "Every micro-batch counts as much as in the full batch."
    lost = [bar["micro_step"] for bar in bars if bar["ratio"] is not None and abs(bar["ratio"]) <= fine]
    if lost and not several:
        which = ", ".join(map(str, lost[:8])) + (" ..." if len(lost) > 8 else "")
        one = len(lost) == 1
        return f"Micro-batch{'' if one else 'es'} {which} {'does' if one else 'do'} not count at all."
    if max(known) - min(known) <= fine * max(map(abs, known)):
        return f"Every micro-batch counts {words.factor(known[0])} times what it should."
    found = [bar["found"] for bar in bars if bar["found"] is not None]
    if found and max(found) - min(found) <= fine * max(map(abs, found)):
        return (
            f"All micro-batches count the same ({words.factor(found[0])}), whatever they hold; "
            f"they should count from {words.factor(min(b['theory'] for b in bars))} "
            f"to {words.factor(max(b['theory'] for b in bars))}."
        )
    return (
        f"The micro-batches count from {words.factor(min(known))} to {words.factor(max(known))} "
        "times what they should."
    )


def _first_module(case: Mapping[str, Any]) -> Panel:
    for cause in case.get("causes") or ():
        facts = cause.get("evidence") or {}
        if facts.get("module"):
            return {"name": facts["module"], "relative": facts.get("relative")}
    return None


# ---- micro-batch walk --------------------------------------------------------------------------


def walk(case: Mapping[str, Any]) -> Panel:
    """Return both runs' calls in one cycle, side by side, the odd ones marked."""
    both = case.get("timelines")
    if not both and case.get("timeline"):
        return {
            "columns": [],
            "rows": [],
            "events": {"accumulated": list(case["timeline"])},
            "left_out": 0,
            "told": "The calls of the accumulated run, in order.",
            "cycle": None,
            "facts": [],
        }
    if not both:
        return None
    cycle = _cycle_shown(both)
    events = {
        role: [e for e in both[role]["events"] if e.get("optimizer_step") == cycle]
        for role in ("full_batch", "accumulated")
    }
    missing = {m["event"] for m in both.get("missing") or () if m["optimizer_step"] == cycle}
    micro = sorted({e["micro_step"] for e in events["accumulated"] if e["micro_step"] is not None})
    columns = [m for m in micro if m >= 0] or [0]
    before = -1 in micro or any(e["micro_step"] == -1 for e in events["full_batch"])
    rows = []
    for kind, title in CALLS.items():
        mine = [e for e in events["accumulated"] if e["event"] == kind]
        theirs = [e for e in events["full_batch"] if e["event"] == kind]
        if not mine and not theirs:
            continue
        cells = []
        for column in [*([-1] if before else []), *columns]:
            here = [e for e in mine if e["micro_step"] == column]
            lacking = kind in missing and column == columns[-1]
            cells.append(
                {
                    "count": len(here),
                    "odd": any(e.get("odd") for e in here),
                    "missing": lacking and not here,
                    "told": event_in_words(here[0]) if here else "",
                }
            )
        rows.append({"title": title, "full_batch": len(theirs), "cells": cells})
    return {
        "cycle": cycle,
        "columns": columns,
        "before": before,
        "rows": rows,
        "facts": _facts(events["accumulated"], columns, case, cycle, before=before),
        "full_loss": _sum_of_losses(events["full_batch"]),
        "full_samples": sum(e.get("samples", 0) for e in events["full_batch"] if e["event"] == "fetch"),
        "events": {role: both[role]["events"] for role in ("full_batch", "accumulated")},
        "left_out": sum(both[role].get("left_out", 0) for role in ("full_batch", "accumulated")),
        "told": _walk_in_words(events, missing, cycle),
    }


def _cycle_shown(both: Mapping[str, Any]) -> int:
    odd = [e["optimizer_step"] for e in both["accumulated"]["events"] if e.get("odd")]
    gone = [m["optimizer_step"] for m in both.get("missing") or ()]
    return int(min([*odd, *gone], default=0))


def _facts(
    events: Sequence[Mapping[str, Any]],
    columns: Sequence[int],
    case: Mapping[str, Any],
    cycle: int,
    *,
    before: bool,
) -> list[dict[str, Any]]:
    """Return what each micro-batch contributed: samples, loss, loss scale, weight."""
    lead: list[str] = [""] if before else []
    rows: list[dict[str, Any]] = []
    fetched = [e.get("samples") for e in events if e["event"] == "fetch"]
    if len(fetched) == len(columns):
        rows.append({"title": "samples", "cells": lead + [str(n) for n in fetched]})
    for key, title in (("loss", "loss"), ("loss_scale", "loss scale")):
        by_column = [
            [e[key] for e in events if e["event"] == "backward" and e["micro_step"] == c and e.get(key) is not None]
            for c in columns
        ]
        if any(by_column):
            cells = [" + ".join(f"{x:.4g}" for x in values[:3]) for values in by_column]
            rows.append({"title": title, "cells": lead + cells})
    for each in [case.get("attribution") or {}, *(case.get("attributions") or ())]:
        found = each.get("candidate_weights")
        if each.get("optimizer_step") == cycle and found and not isinstance(found[0], list):
            if len(found) == len(columns):
                rows.append({"title": "weight", "cells": lead + [words.factor(w) for w in found]})
            break
    return rows


def _sum_of_losses(events: Sequence[Mapping[str, Any]]) -> str:
    values = [e["loss"] for e in events if e["event"] == "backward" and e.get("loss") is not None]
    return f"{sum(values):.4g}" if values else ""


def event_in_words(event: Mapping[str, Any]) -> str:
    """Return the details of an event."""
    shown = {
        k: v
        for k, v in event.items()
        if k not in ("event", "optimizer_step", "micro_step", "odd") and v is not None
    }
    return ", ".join(f"{k.replace('_', ' ')} {short(v)}" for k, v in shown.items())


def short(value: Any) -> str:
    """Return a value of the result with at most four digits."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(short(each) for each in value[:4])
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _walk_in_words(
    events: Mapping[str, Sequence[Mapping[str, Any]]], missing: set[str], cycle: int
) -> str:
    odd = Counter(e["event"] for e in events["accumulated"] if e.get("odd"))
    said = []
    for kind, count in odd.items():
        where = sorted({e["micro_step"] for e in events["accumulated"] if e.get("odd") and e["event"] == kind})
        after = ", ".join(map(str, where[:6])) + (" ..." if len(where) > 6 else "")
        often = "once" if count == 1 else f"{count} times"
        verb = "happens" if kind in ("step", "clip", "zero_grad", "unscale", "scheduler", "scaler") else "is seen"
        said.append(f"{CALLS[kind]} {verb} {often} inside the cycle, after micro_step {after}")
    said += [f"{CALLS[kind]} is missing" for kind in CALLS if kind in missing]
    if not said:
        return f"In optimizer_step {cycle} both runs make the same calls, and none inside the cycle."
    return f"In optimizer_step {cycle}, {'; '.join(said)}. The full batch has none of that."


# ---- parameters --------------------------------------------------------------------------------


def parameters(case: Mapping[str, Any]) -> Panel:
    """Return one row per parameter, worst first, and the heatmap of modules over steps."""
    table = [dict(row) for row in case.get("per_parameter") or ()]
    heat = heatmap(case)
    if not table and heat is None:
        return None
    table.sort(key=lambda row: (bool(row.get("zero")), -_size(row)))
    axis = Decades.over([row.get("relative") for row in table if not row.get("zero")])
    limit = case.get("limit")
    for row in table:
        row["beyond"] = bool(
            not row.get("zero")
            and (
                row["multiple"] > limit
                if limit and row.get("multiple") is not None
                else words.failed(case) and _size(row) > 1e-9
            )
        )
        row["bar"] = 0.0 if row.get("zero") else axis.place(row.get("relative"))
    off = sum(row["beyond"] for row in table)
    zero = sum(bool(row.get("zero")) for row in table)
    return {
        "rows": table,
        "heat": heat,
        "step": table[0].get("optimizer_step") if table else None,
        "multiples": any(row.get("multiple") is not None for row in table),
        "told": _parameters_in_words(len(table), off, zero, heat),
    }


def _size(row: Mapping[str, Any]) -> float:
    value = row.get("relative")
    return math.inf if value is None else float(value)


def _parameters_in_words(count: int, off: int, zero: int, heat: Panel) -> str:
    if not count:
        return "Difference by module, in multiples of the noise."
    told = f"{off} of {count} parameters differ by more than rounding"
    if off == 0:
        told = f"All {count} parameters agree to within rounding"
    elif heat is not None and off < count:
        bad = [row["name"] for row in heat["rows"] if row["worst"] > 0]
        if bad and len(bad) < len(heat["rows"]):
            told += f", all in {', '.join(bad[:3])}" + (" ..." if len(bad) > 3 else "")
    if zero:
        told += f"; {zero} ha{'s' if zero == 1 else 've'} a gradient that is zero but for rounding (~0)"
    return told + "."


def heatmap(case: Mapping[str, Any]) -> Panel:
    """Return the multiples of the noise by kind of module and optimizer step, in five shades."""
    modules = case.get("modules")
    if not modules or not modules.get("rows"):
        return None
    limit = case.get("limit") or 100.0
    steps = list(modules["optimizer_step"])
    edges = [round(i * len(steps) / min(len(steps), 64)) for i in range(min(len(steps), 64) + 1)]
    rows = []
    for row in modules["rows"][:32]:
        cells = []
        for begin, end in zip(edges, edges[1:], strict=False):
            values = [v for v in row["multiple"][begin:end] if v is not None]
            errors = [v for v in row["relative"][begin:end] if v is not None]
            worst = max(values, default=None)
            cells.append(
                {
                    "shade": shade(worst, limit),
                    "multiple": worst,
                    "relative": max(errors, default=None),
                    "step": steps[begin],
                }
            )
        rows.append(
            {
                "name": row["name"],
                "parameters": row["parameters"],
                "scale": row.get("scale"),
                "cosine": row.get("cosine"),
                "cells": cells,
                "worst": max((c["shade"] for c in cells), default=0),
            }
        )
    return {
        "steps": [steps[edge] for edge in edges[:-1]],
        "rows": rows,
        "of": modules.get("of", len(rows)),
        "wide": len(edges) - 1 <= 12,
    }


def shade(multiple: float | None, limit: float) -> int:
    """Return 0 within the limit, 1 to 5 for every three decades beyond it."""
    if multiple is None or multiple <= limit:
        return 0
    if math.isinf(multiple):
        return 5
    return min(5, 1 + int(math.log10(multiple / limit) / 3))


# ---- precision, ranks, control -----------------------------------------------------------------


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
    told = (
        f"As written ({dtype}), the full batch errs by {full}; accumulating itself adds {lost}, "
        f"{words.times(whole['units'])} the roundoff expected at this K."
        if whole.get("units") is not None
        else f"As written ({dtype}), the full batch errs by {full}; accumulating itself adds {lost}."
    )
    if case["verdict"] == "divergent" and (whole.get("accumulated") or 0) > 10 * (whole.get("full_batch") or 0):
        return told + f" The accumulated run is off by {words.number(whole['accumulated'])}: by the fault, not by rounding."
    if case["verdict"] == "precision-loss":
        return told + " That is more than this precision should lose."
    return told


def ranks(case: Mapping[str, Any]) -> Panel:
    """Return what is known of each rank; None with one process."""
    given = case.get("ranks")
    if not given and (case.get("world_size") or 1) < 2:
        return None
    rows = [dict(each) for each in given] if isinstance(given, list) else []
    rows = [each for each in rows if isinstance(each, Mapping)]
    titles = list(dict.fromkeys(key for row in rows for key in row if _flat(row[key])))
    facts = given if isinstance(given, Mapping) else {}
    return {
        "world_size": case.get("world_size"),
        "strategy": case.get("strategy"),
        "titles": titles,
        "rows": [[short(row.get(title, "")) for title in titles] for row in rows],
        "facts": [(str(k).replace("_", " "), short(v)) for k, v in facts.items() if _flat(v)],
        "told": f"{case.get('world_size')} ranks, strategy {case.get('strategy')}.",
    }


def _flat(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (
        isinstance(value, list) and (len(value) > 8 or any(isinstance(x, (list, Mapping)) for x in value))
    )


def control(case: Mapping[str, Any]) -> Panel:
    """Return control, noise and measured difference of every quantity, and the detection power."""
    rows = [
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
