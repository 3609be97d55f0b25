"""The sentences and numbers that all renderings share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.case import Case
from equivcheck.causes import CAUSES, name_of
from equivcheck.errors import UsageError
from equivcheck.result import case_exit_code, missing_causes

COMPARED = ("gradients", "learning_rates", "losses", "parameters", "buffers")
MOST_ITEMS = 8
ZERO = 1e-13  # of the largest weight; a fit of float64 gradients gives a zero to 1e-16
TRIALS_SHOWN = 3  # of those that did not put all right
SHOWN_ELSEWHERE = ("because", "finite", "weights", "true_weights", "intervention", "shared")
# What each intervention does, to be read after "with".
PUT_RIGHT = {
    "reweight": "each backward multiplied by the weight it should have",
    "reweight an addend": "one addend of the loss multiplied by the weight it should have",
    "defer": "the calls inside the cycle left out",
    "postpone": "the calls inside the cycle made once, at its end",
    "ration": "one call per cycle",
    "retime": "one optimizer step at the end of every cycle",
    "unscale before the clip": "the loss scale removed before the clip",
    "recount": "the schedule counted in optimizer steps",
    "without the tail": "the incomplete last cycle left out of both runs",
    "hold": "the gradients kept as they are between the backwards of a cycle",
    "fresh": "old gradients dropped before each cycle",
    "restitute": "what is missing added to the gradients",
    "none for zeros": "no gradient, instead of zeros, for parameters that took no part",
    "state before the step": "every optimizer step started from the full batch's state",
    "buffers held still": "buffers held still in both runs",
    "rewind": "the state set back to the start of its cycle before each micro-batch",
    "freeze": "the statistics of the full batch in both runs",
    "widen": "the gradients accumulated in float64",
    "rescale at the step": "the gradients multiplied at the step by what they lack",
    "shrink": "every gradient too small to be clipped, in both runs",
    "synchronise": "one reduction over the ranks at the end of the cycle",
    "sum over ranks": "the gradients that differ between ranks added up at the end of the cycle",
    "synchronise once": "one reduction over the ranks at the end of the cycle",
    "broadcast": "one rank's parameters and buffers given to all",
    "find unused parameters": "DDP told to look for unused parameters",
    "clip by the norm of the whole": "the clip by the norm of the whole gradient",
    "scale parts": "each rank's part clipped by the norm of the whole gradient",
}
# Kinds of findings, as the quantity that a reader knows them by.
SHOWN_AS = {
    "gradients": "gradients",
    "applied": "gradients",
    "learning_rates": "learning_rates",
    "logged": "losses",
    "parameters": "parameters",
    "state": "optimizer_state",
    "buffers": "buffers",
    "shadows": "shadow_weights",
}
# Kinds of findings that are no quantity of their own, as what an intervention puts right of them.
MEASURED = {"samples": "share of other samples", "none": "share of absent gradients"}
MARGINS = {
    "": "nothing compared",
    "samples": "other samples in an optimizer step",
    "none": "gradients absent in one run",
}
# What a detector's key says to someone who has not read the detector.
TOLD = {
    "times": "counts, times what it should",
    "same_in_every_micro_batch": "the same in every micro-batch",
    "calls_inside_cycles": "calls inside cycles, all in all",
    "micro_step": "first after micro_step",
    "spread_between_ranks": "largest difference between ranks",
    "of": "of the",
    "accumulation": "lost by accumulating",
    "unit_roundoffs": "the same, in unit roundoffs",
}
SHOUTED = {"divergent": "DIVERGENT", "precision-loss": "PRECISION-LOSS", "error": "ERROR"}


def number(value: float | None, digits: int = 1) -> str:
    """Return a relative error as `3.0e+00`, an exact zero as `0`, an unknown one as `-`."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.{digits}e}"


def factor(value: float | None) -> str:
    """Return a scale or a weight with four significant digits."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:#.4g}"


def weighed(values: Sequence[Any]) -> list[Any]:
    """Return weights in which what is zero but for rounding is zero."""
    rows = values if values and isinstance(values[0], list) else [values]
    top = max((abs(v) for row in rows for v in row if v is not None), default=0.0)
    kept = [[0.0 if v is not None and abs(v) <= ZERO * top else v for v in row] for row in rows]
    return kept if rows is values else kept[0]


def times(value: float) -> str:
    """Return a ratio that may span many decades: `57x`, `2e+14x`."""
    return f"{value:.2g}x" if value < 100 else f"{value:.0f}x" if value < 1e5 else f"{value:.0e}x"


def size(count: float) -> str:
    """Return a number of bytes with three digits at most: `980 bytes`, `24.6 kB`."""
    unit, *larger = "bytes", "kB", "MB", "GB", "TB"
    for each in larger:
        if count < 999.5:
            break
        count, unit = count / 1000, each
    return f"{count:.3g} {unit}"


def label(case: Mapping[str, Any]) -> str:
    """Return what tells this case from its neighbours, as in `K=4 split=uneven`."""
    try:
        return Case.from_dict(case).label
    except (UsageError, TypeError):  # a result of a later version
        return f"K={case.get('accumulation_steps', '?')}"


def interrupted(result: Mapping[str, Any]) -> str:
    """Return that a run was interrupted and how much of it ran; empty for one that came to its end."""
    if not result.get("interrupted"):
        return ""
    # What a shard has planned is the whole, of which it is a part.
    count, planned = len(result["cases"]), 0 if result.get("shard") else result.get("planned") or 0
    of = f" of {planned}" if planned > count else ""
    return f"interrupted: {count}{of} case{'' if not of and count == 1 else 's'} ran"


def failed(case: Mapping[str, Any]) -> bool:
    """Return whether this case needs a block of its own."""
    return case_exit_code(case) != 0


def compared(case: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the quantities that were compared, in the order of the catalogue's trust in them."""
    divergence = case.get("divergence") or {}
    return [(name, divergence[name]) for name in COMPARED if divergence.get(name)]


def farthest(case: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the quantity to show: what was found to differ, gradients before all others."""
    known = [(n, d["relative"]) for n, d in compared(case) if d.get("relative") is not None]
    found = {each["kind"]: each["relative"] for each in reversed(case.get("findings") or ())}
    found = {SHOWN_AS[kind]: size for kind, size in found.items() if kind in SHOWN_AS}
    for name, size in known:
        if name in found:
            return name, size
    for name, size in found.items():
        if size is not None:
            return name, size
    if not known or case.get("findings"):  # what differs is no number
        return None
    if failed(case):
        return max(known, key=lambda pair: pair[1])
    # Where gradients were not compared, what they are for was.
    return next((pair for pair in known if pair[0] in ("gradients", "parameters")), known[0])


def margin(case: Mapping[str, Any]) -> str:
    """Return measured difference and its distance from the noise allowed, in words."""
    far = farthest(case)
    if differs(case, "samples"):
        seen = case.get("optimizer_steps_seen") or {}
        if seen.get("accumulated") != seen.get("full_batch"):
            return f"{seen.get('accumulated')} optimizer steps, not {seen.get('full_batch')}"
    if far is None:
        kinds = {each["kind"] for each in case.get("findings") or ()}
        return MARGINS.get("samples" if "samples" in kinds else min(kinds, default=""), "differs")
    name, relative = far
    loss = case.get("precision_loss") or {}
    if case["verdict"] == "precision-loss" and loss:
        return f"accumulating loses {number(loss.get('accumulation'))}"
    for cause in case.get("causes") or ():
        facts = cause.get("evidence") or {}
        if facts.get("shared") and facts.get("relative") is not None and not case.get("findings"):
            return f"full batch off by {number(facts['relative'])}"
    # What is not decided has no distance to what decides.
    decided = not case.get("findings") and case["verdict"] != "inconclusive"
    ratio = case.get("margin") if decided else None
    if relative == 0:
        return f"{name.replace('_', ' ')} bitwise equal"
    shown = f"{name.replace('_', ' ')} {number(relative)}"
    if not ratio:
        return shown
    return f"{shown}  margin {times(ratio)}" if ratio >= 1 else f"{shown}  {times(1 / ratio)} noise"


def codes(case: Mapping[str, Any]) -> list[str]:
    """Return the codes of a case's causes, as ordered by the engine."""
    return [cause["code"] for cause in case.get("causes") or ()]


def headline(case: Mapping[str, Any]) -> str:
    """Return the one line that short summaries show: code, name and number come first."""
    if case["verdict"] == "error":
        error = case.get("error") or {}
        ours = "internal error: " if error.get("exit_code") == 70 else ""
        return f"{ours}{error.get('type', 'error')}: {_first_line(error.get('message', ''))}"
    given = _first_line(case.get("headline") or "")
    causes = case.get("causes") or ()
    if not causes or not failed(case):
        absent = missing_causes(case)
        if absent and case["verdict"] in ("equivalent", "expected"):
            return f"{absent[0]} {name_of(absent[0])}: declared, but not found ({label(case)})"
        return given or f"{case['verdict']}: {margin(case)}"
    code = causes[0]["code"]
    if given.startswith(code):
        return given
    far = farthest(case)
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    scale, cosine = gradients.get("scale"), gradients.get("cosine")
    name = causes[0].get("name") or name_of(code)
    if scale is not None and cosine is not None and cosine > 1 - 1e-9 and far is not None:
        size = f"{factor(scale)}x the full batch's gradient"
    elif far is not None:
        size = f"{far[1]:.0e} relative error of the {far[0].replace('_', ' ')}"
    else:
        size = given or case["verdict"]
    return f"{code} {name}: {size} ({label(case)})"


def warning(found: Mapping[str, Any]) -> str:
    """Return what a warning measured, in words; empty for one that says no numbers."""
    told = found.get("evidence") or {}
    if told.get("count") is None or told.get("bytes") is None:
        return ""
    few = (
        f", where {_reductions(told['minimum_count'])} ({size(told['minimum_bytes'])}) would do"
        if told.get("minimum_count") is not None and told.get("minimum_bytes") is not None
        else ""
    )
    return f"{_reductions(told['count'])} ({size(told['bytes'])}) per optimizer step{few}"


def _reductions(count: int) -> str:
    return f"{count} reduction{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    """Return text as a sentence; a name of code at its start keeps its case."""
    first = text.split(" ", 1)[0]
    plain = first.replace("'", "").replace("-", "").isalpha()
    start = text[:1].upper() + text[1:] if plain else text
    return start if not start or start[-1] in ".!?" else start + "."


def because(cause: Mapping[str, Any]) -> str:
    """Return the mechanism: the cause's own sentence, or the catalogue's."""
    stated = (cause.get("evidence") or {}).get("because") or cause.get("because")
    return str(stated) if stated else CAUSES[cause["code"]].because if _known(cause) else ""


def fix(cause: Mapping[str, Any]) -> str:
    """Return the repair: the cause's own, or the catalogue's."""
    return str(cause.get("fix") or (CAUSES[cause["code"]].fix if _known(cause) else ""))


def put_right(names: Sequence[Any]) -> str:
    """Return in words what an intervention, or several, did to the loop."""
    return " and ".join(PUT_RIGHT.get(str(name), f"“{name}”") for name in dict.fromkeys(names))


def measured_by(case: Mapping[str, Any], cause: Mapping[str, Any]) -> str:
    """Return what an intervention's divergence before it is a divergence of; empty where it is the gradients'.

    It is the largest of all that was found to differ.
    """
    before = ((cause.get("evidence") or {}).get("intervention") or {}).get("relative_before")
    if before is None:
        return ""
    sizes: dict[str, float] = {}
    for each in case.get("findings") or ():
        sizes[each["kind"]] = max(sizes.get(each["kind"], 0.0), each.get("relative") or 0.0)
    same = [kind for kind, size in sizes.items() if abs(size - before) <= 1e-3 * abs(before)]
    if not same or "gradients" in same or "applied" in same:
        return ""
    # Where rates and what follows from them are off by the same number, the rates are named.
    kind = "learning_rates" if "learning_rates" in same else same[0]
    return MEASURED.get(kind, SHOWN_AS.get(kind, kind)).replace("_", " ")


def evidence(case: Mapping[str, Any], cause: Mapping[str, Any]) -> list[str]:
    """Return what proves a cause or speaks for it, one statement per item."""
    lines = []
    done = (cause.get("evidence") or {}).get("intervention")
    if isinstance(done, Mapping):
        what = " + ".join(dict.fromkeys(str(each) for each in done.get("put_right") or ()))
        before, after = (number(done.get(f"relative_{when}")) for when in ("before", "after"))
        of = measured_by(case, cause)
        lines.append(
            f"put right ({what}): {of}{' ' if of else ''}{before} -> {after}, within noise"
        )
        if done.get("logged_after") is not None:
            log = number(done["logged_after"])
            lines.append(f"the logged losses have the same fault: {log} is left in them")
    lines += arguments(case, cause)
    plain = facts(cause)
    if plain:
        lines.append(", ".join(f"{key} {value}" for key, value in plain))
    return lines


def _best_trials(case: Mapping[str, Any], code: str) -> list[str]:
    """Return what is left at best with each set of causes put right that holds a code, the `TRIALS_SHOWN` closest."""
    best: dict[str, float] = {}
    for trial in case.get("interventions") or ():
        codes, left = trial.get("codes") or (), trial.get("relative")
        if code in codes:
            what, size = ", ".join(codes), math.inf if left is None else float(left)
            best[what] = min(best.get(what, math.inf), size)
    closest = sorted(best.items(), key=lambda each: each[1])[:TRIALS_SHOWN]
    return [
        f"put right ({what}): {number(None if math.isinf(size) else size)} is left"
        for what, size in closest
    ]


def arguments(case: Mapping[str, Any], cause: Mapping[str, Any]) -> list[str]:
    """Return what speaks for a cause besides its proof and its numbers."""
    lines = []
    stated = cause.get("evidence") or {}
    if not isinstance(stated.get("intervention"), Mapping) and cause.get("status") != "proved":
        lines += _best_trials(case, cause["code"])
    if stated.get("shared"):
        lines.append("the full batch has this fault too")
    return lines


def facts(cause: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers and places that a detector found, as pairs of text."""
    return [
        (TOLD.get(key, key.replace("_", " ")), _value(value))
        for key, value in (cause.get("evidence") or {}).items()
        if key not in SHOWN_ELSEWHERE and _printable(value)
    ]


def weights(case: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the attribution as rows of text: one for the full batch, one for the candidate."""
    attribution = case.get("attribution") or {}
    rows = []
    for role, title in (("reference", "full batch"), ("candidate", "accumulated")):
        values, residual = attribution.get(f"{role}_weights"), attribution.get(f"{role}_residual")
        if values:
            rows.append((title, f"{weights_line(values)}  residual {number(residual)}"))
    return [("", untold)] if (untold := untold_weights(case)) else rows


def untold_weights(case: Mapping[str, Any]) -> str:
    """Return why no weight is known, where there are more pieces than parameters; else an empty text."""
    attribution = case.get("attribution") or {}
    flat: list[Any] = []
    for role in ("reference", "candidate"):
        for value in attribution.get(f"{role}_weights") or ():
            flat += value if isinstance(value, list) else [value]
    pieces, parameters = len(flat) // 2, case.get("parameters_count")
    if not flat or any(value is not None for value in flat):
        return ""
    if not parameters or pieces <= parameters:
        return ""
    return f"{pieces} pieces, {parameters} parameters: weights cannot be told"


def differs(case: Mapping[str, Any], *kinds: str) -> bool:
    """Return whether something of some kinds was found to differ."""
    return any(each["kind"] in kinds for each in case.get("findings") or ())


def worst_parameters(case: Mapping[str, Any], limit: int) -> Sequence[Mapping[str, Any]]:
    """Return the parameters whose gradients are farthest off, zero ones left out; none if all agree."""
    if case.get("findings") is not None and not differs(case, "gradients", "applied"):
        return []
    rows = [row for row in case.get("per_parameter") or () if not row.get("zero")]
    return sorted(rows, key=lambda row: -(row.get("relative") or 0.0))[:limit]


def weights_line(values: Sequence[Any]) -> str:
    """Return weights in one line, those of several ranks with bars between them."""
    values = weighed(values)
    if values and isinstance(values[0], list):
        return " | ".join(weights_line(row) for row in values)
    shown = [factor(value) for value in values[:8]]
    return " ".join(shown) + (f" ... ({len(values)})" if len(values) > len(shown) else "")


def _printable(value: Any) -> bool:
    if isinstance(value, list):
        return 0 < len(value) <= MOST_ITEMS and not any(
            isinstance(x, (Mapping, list)) for x in value
        )
    return not isinstance(value, Mapping)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(_value(each) for each in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _first_line(text: str) -> str:
    return next(iter(str(text).splitlines()), "")


def _known(cause: Mapping[str, Any]) -> bool:
    return cause["code"] in CAUSES
