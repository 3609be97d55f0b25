"""The micro-batch walk: both runs, call by call, in one cycle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.report import words
from equivcheck.report.panels._panel import Panel, short

CALLS = {
    "zero_grad": "zero_grad",
    "cleared": "gradients cleared",
    "edited": "gradients changed",
    "rescaled": "gradients multiplied",
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
# Ways of working together in which each cycle ends with a reduction of the gradients.
REDUCING = frozenset({"ddp", "zero"})


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
    cycle = _cycle_shown(case, both)
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
        "full_samples": sum(
            e.get("samples", 0) for e in events["full_batch"] if e["event"] == "fetch"
        ),
        "events": {role: both[role]["events"] for role in ("full_batch", "accumulated")},
        "left_out": sum(both[role].get("left_out", 0) for role in ("full_batch", "accumulated")),
        "rank": 0 if (case.get("world_size") or 1) > 1 else None,
        "told": " ".join(
            filter(None, [_walk_in_words(events, missing, cycle), _sent_nothing(case, cycle)])
        ),
    }


def _sent_nothing(case: Mapping[str, Any], cycle: int) -> str:
    """Return that no gradient was reduced in the cycle, where each ought to be."""
    reduced = _reductions(case, cycle)
    if not reduced or any(reduced) or case.get("strategy") not in REDUCING:
        return ""
    return "No gradient is reduced over the ranks."


def _cycle_shown(case: Mapping[str, Any], both: Mapping[str, Any]) -> int:
    """Return the first cycle with an odd or missing call; without one, that in which the runs first differ."""
    odd = [e["optimizer_step"] for e in both["accumulated"]["events"] if e.get("odd")]
    gone = [m["optimizer_step"] for m in both.get("missing") or ()]
    kept = {e["optimizer_step"] for e in both["accumulated"]["events"]}
    differ = [f.get("optimizer_step") for f in case.get("findings") or ()]
    return int(min([*odd, *gone] or [c for c in differ if c in kept], default=0))


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
            [
                e[key]
                for e in events
                if e["event"] == "backward" and e["micro_step"] == c and e.get(key) is not None
            ]
            for c in columns
        ]
        if any(by_column):
            cells = [" + ".join(f"{x:.4g}" for x in values[:3]) for values in by_column]
            rows.append({"title": title, "cells": lead + cells})
    for each in [case.get("attribution") or {}, *(case.get("attributions") or ())]:
        found = each.get("candidate_weights")
        if each.get("optimizer_step") == cycle and found:
            found = words.weighed(found)
            own = found[0] if isinstance(found[0], list) else found  # the calls shown are rank 0's
            if len(own) == len(columns):
                rows.append({"title": "weight", "cells": lead + [words.factor(w) for w in own]})
            break
    reduced = _reductions(case, cycle)
    if len(reduced) == len(columns) and (any(reduced) or case.get("strategy") in REDUCING):
        rows.append(
            {"title": "all-reduces", "cells": lead + [str(n or "\N{MIDDLE DOT}") for n in reduced]}
        )
    return rows


def _reductions(case: Mapping[str, Any], cycle: int) -> Sequence[int]:
    """Return how often rank 0 reduced after each backward of the cycle, as written."""
    for rank in case.get("ranks") or ():
        for each in rank.get("collectives") or () if isinstance(rank, Mapping) else ():
            if each.get("optimizer_step") == cycle:
                return each.get("reductions") or ()
        break
    return ()


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


def _walk_in_words(
    events: Mapping[str, Sequence[Mapping[str, Any]]], missing: set[str], cycle: int
) -> str:
    odd = Counter(e["event"] for e in events["accumulated"] if e.get("odd"))
    said = []
    for kind, count in odd.items():
        where = sorted(
            {e["micro_step"] for e in events["accumulated"] if e.get("odd") and e["event"] == kind}
        )
        after = ", ".join(map(str, where[:6])) + (" ..." if len(where) > 6 else "")
        often = "once" if count == 1 else f"{count} times"
        verb = (
            "happens"
            if kind in ("step", "clip", "zero_grad", "unscale", "scheduler", "scaler")
            else "is seen"
        )
        said.append(f"{CALLS[kind]} {verb} {often} inside the cycle, after micro_step {after}")
    gone = [CALLS[kind] for kind in CALLS if kind in missing]
    if not said and not gone:
        return (
            f"In optimizer_step {cycle} both runs make the same calls, and none inside the cycle."
        )
    told = (
        f"In optimizer_step {cycle}, {'; '.join(said)}. The full batch has none of that."
        if said
        else ""
    )
    if gone:
        verb = "is" if len(gone) == 1 else "are"
        told += f" In optimizer_step {cycle}, {' and '.join(gone)} {verb} missing, which the full batch has."
    return told.strip()
