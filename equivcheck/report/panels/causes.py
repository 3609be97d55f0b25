"""The verdict and the causes: how far the runs are apart, and what proves why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.causes import CAUSES, name_of
from equivcheck.report import words
from equivcheck.report.panels._panel import Panel
from equivcheck.report.scales import Decades


def ruler(case: Mapping[str, Any]) -> Panel:
    """Return the measured difference beside the noise, and what is left when the cause is put right."""
    far = _told(case) or words.farthest(case)
    if far is None:
        return None
    name, relative = far
    numbers = (case.get("divergence") or {}).get(name) or {}
    noise, power = numbers.get("control"), case.get("detection_power")
    after = next(
        (
            p["after"]
            for c in case.get("causes") or ()
            if (p := proof(case, c)) and p["after"] is not None
        ),
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


def _told(case: Mapping[str, Any]) -> tuple[str, float] | None:
    """Return the number of a fault that the comparison of the two runs does not show."""
    if not words.failed(case) or case.get("findings"):
        return None
    if case["verdict"] == "inconclusive" and words.codes(case):
        repeat = next((e["relative"] for e in _evidence(case) if e.get("repeat")), None)
        return None if repeat is None else ("between two full-batch runs", repeat)
    lost = (case.get("precision_loss") or {}).get("accumulation")
    if case["verdict"] == "precision-loss" and lost is not None:
        return "lost by accumulating", lost
    for evidence in _evidence(case):
        if evidence.get("relative") is not None:
            return "from what it should be", evidence["relative"]
    return None


def _evidence(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cause.get("evidence") or {} for cause in case.get("causes") or ()]


def proof(case: Mapping[str, Any], cause: Mapping[str, Any]) -> Panel:
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
        "of": words.measured_by(case, cause),
    }


def causes(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the causes of a case, each with everything that speaks for it."""
    return [
        {
            **_entry(cause),
            "status": cause.get("status") or "suspected",
            "step": cause.get("optimizer_step"),
            "proof": proof(case, cause),
            "facts": words.arguments(case, cause),
            "pairs": [pair for pair in words.facts(cause) if pair[0] != "ruled out"],
            "ruled_out": list((cause.get("evidence") or {}).get("ruled_out") or ()),
        }
        for cause in case.get("causes") or ()
    ]


def warnings(case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what a case is warned of, written like a cause: right numbers at a needless cost."""
    found = []
    for each in case.get("warnings") or ():
        facts = [words.sentence(words.warning(each))]
        if (each.get("evidence") or {}).get("proved"):
            facts.append("With one reduction at the end of each cycle the update is the same.")
        found.append({**_entry(each), "status": "warning", "facts": list(filter(None, facts))})
    return found


def _entry(cause: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the catalogue knows, where the result does not say it otherwise."""
    entry = CAUSES.get(cause["code"])
    return {
        "code": cause["code"],
        "name": cause.get("name") or name_of(cause["code"]),
        "because": words.sentence(words.because(cause)),
        "fix": words.fix(cause),
        "summary": entry.summary if entry else "",
        "mathematics": entry.mathematics if entry else "",
        "proved_by": entry.proved if entry else "",
        "seen": entry.seen_in_the_wild if entry else (),
        "proof": None,
        "pairs": [],
        "ruled_out": [],
    }
