"""The weights: what each micro-batch should count, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.report import words
from equivcheck.report.panels._panel import Panel

MOST_RANKS = 8  # in a sentence


def weights(case: Mapping[str, Any]) -> Panel:
    """Return what each micro-batch should count and what it counts, per rank."""
    attribution = case.get("attribution") or {}
    theory, found = (attribution.get(f"{role}_weights") for role in ("reference", "candidate"))
    if not theory or not found:
        return None
    theories, founds = _by_rank(words.weighed(theory)), _by_rank(words.weighed(found))
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
    residuals = {role: attribution.get(f"{role}_residual") for role in ("reference", "candidate")}
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
        "told": _weights_in_words(
            rows, residuals, counts, _resolution(case), words.untold_weights(case)
        ),
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
            each = len(theories[0]) if len(numbers) == len(flat) else len(numbers)
            shown = " | ".join(
                " ".join(map(str, numbers[at : at + each])) for at in range(0, len(numbers), each)
            )
            found.append({"label": label, "values": numbers, "shown": shown, "followed": followed})
    return found


def _nested(values: Sequence[Any]) -> bool:
    return bool(values) and isinstance(values[0], list)


def _proportional(weights_found: Sequence[Any], counts: Sequence[Any]) -> bool:
    if len(weights_found) != len(counts) or not all(counts) or None in weights_found:
        return False
    ratios = [v / n for v, n in zip(weights_found, counts, strict=True)]
    return bool(max(ratios) - min(ratios) <= 1e-9 * max(map(abs, ratios)))


def _resolution(case: Mapping[str, Any]) -> float:
    """Return how fine weights are known: some times the detection power; coarse where that is unknown."""
    power = case.get("detection_power")
    return max(1e-12, 10 * power) if power is not None else 1e-6


def _weights_in_words(
    rows: Sequence[Mapping[str, Any]],
    residuals: Mapping[str, float | None],
    counts: Sequence[Mapping[str, Any]],
    fine: float,
    untold: str,
) -> str:
    bars = [bar for row in rows for bar in row["bars"]]
    outside = [role for role, size in residuals.items() if size is not None and size > fine]
    if untold:
        told = words.sentence(untold)
    elif "reference" in outside:
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
        told = _ranks_in_words(rows, fine) or _ratios_in_words(bars, fine, several=len(rows) > 1)
    followed = next((c["label"] for c in counts if c["followed"]), None)
    if followed:
        told += f" The right weights follow the count of {followed}."
    return told


def _ranks_in_words(rows: Sequence[Mapping[str, Any]], fine: float) -> str:
    """Return what is wrong between ranks; empty where there is one, or nothing wrong, or more than that."""
    ratios = [[bar["ratio"] for bar in row["bars"]] for row in rows]
    if len(rows) < 2 or any(r is None for row in ratios for r in row):
        return ""
    means = [sum(row) / len(row) for row in ratios]
    alike = all(
        abs(r - mean) <= fine * max(abs(mean), 1.0)
        for row, mean in zip(ratios, means, strict=True)
        for r in row
    )
    if not alike or max(means) - min(means) <= fine * max(map(abs, means)):
        return ""
    told = [
        f"rank {rank} counts {words.factor(mean)} times what it should"
        for rank, mean in enumerate(means[:MOST_RANKS])
    ]
    more = ", ..." if len(means) > MOST_RANKS else ""
    return f"The micro-batches of a rank count as they should among themselves, but {', '.join(told)}{more}."


def _ratios_in_words(bars: Sequence[Mapping[str, Any]], fine: float, *, several: bool) -> str:
    ratios = [bar["ratio"] for bar in bars]
    known = [r for r in ratios if r is not None]
    if not known:
        return "The weights are not determined: the micro-batches' gradients are not independent."
    if all(abs(r - 1) <= fine for r in known):
        return "Every micro-batch counts as much as in the full batch."
    lost = [
        bar["micro_step"] for bar in bars if bar["ratio"] is not None and abs(bar["ratio"]) <= fine
    ]
    if lost and not several:
        which = ", ".join(map(str, lost[:8])) + (" ..." if len(lost) > 8 else "")
        one = len(lost) == 1
        return (
            f"Micro-batch{'' if one else 'es'} {which} {'does' if one else 'do'} not count at all."
        )
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
