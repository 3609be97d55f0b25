"""What changed between two results: new, gone, fixed, broken, worse and better cases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equivcheck.report import html, panels, text, words
from equivcheck.report.scales import Decades

# Rounding moves a noise-level error by a few times between machines, not tenfold.
FACTOR = 10.0
ORDER = ("broken", "worse", "new", "changed", "better", "fixed", "gone", "same")
MOST = 2000  # rows of a page


def change(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Return new, gone, fixed, broken, changed (other verdict or causes), worse, better or same.

    A new case that fails is broken: nothing may fail unseen because it has no past.
    """
    if after is None:
        return "gone"
    if before is None:
        return "broken" if words.failed(after) else "new"
    if words.failed(before) != words.failed(after):
        return "broken" if words.failed(after) else "fixed"
    if (before["verdict"], words.codes(before)) != (after["verdict"], words.codes(after)):
        return "changed"
    old, new = words.farthest(before), words.farthest(after)
    if old and new and old[1] and new[1] and words.failed(after):
        ratio = new[1] / old[1]
        return "worse" if ratio > FACTOR else "better" if ratio < 1 / FACTOR else "same"
    return "same"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry per case of either result, in the order of the old one, then of the new."""
    before = {case["id"]: case for case in old["cases"]}
    after = {case["id"]: case for case in new["cases"]}
    return [
        {
            "id": identity,
            "what": change(before.get(identity), after.get(identity)),
            "before": before.get(identity),
            "after": after.get(identity),
            "case": after.get(identity) or before[identity],
        }
        for identity in [*before, *(i for i in after if i not in before)]
    ]


def told(case: Mapping[str, Any] | None) -> str:
    """Return one side of a change in words."""
    if case is None:
        return "-"
    found = ",".join(words.codes(case))
    return " ".join(filter(None, [case["verdict"], found, words.margin(case)]))


def page(old: Mapping[str, Any], new: Mapping[str, Any], names: tuple[str, str]) -> str:
    """Return the comparison of two results as one self-contained page."""
    found = changes(old, new)
    counts = {what: sum(each["what"] == what for each in found) for what in ORDER}
    shown = [each for each in found if each["what"] != "same"]
    shown.sort(key=lambda each: ORDER.index(each["what"]))
    rows = [_row(each) for each in shown[:MOST]]
    environment = [
        (key, (old.get("environment") or {}).get(key), (new.get("environment") or {}).get(key))
        for key in dict.fromkeys([*(old.get("environment") or {}), *(new.get("environment") or {})])
    ]
    return html.write(
        "diff.html",
        counts=counts,
        rows=rows,
        more=len(shown) - len(rows),
        names=names,
        environment=environment,
        headline=headline(counts),
        bad=bool(counts["broken"]),
        data=html.embedded(
            {
                "summary": markdown(old, new),
                "result": {
                    "changes": [{key: each[key] for key in ("id", "what")} for each in shown]
                },
            }
        ),
    )


def headline(counts: Mapping[str, int]) -> str:
    """Return the comparison in one line."""
    parts = [f"{count} {what}" for what, count in counts.items() if count and what != "same"]
    same = f"{counts['same']} same"
    return f"{', '.join(parts)}; {same}" if parts else f"Nothing changed: {same}"


def markdown(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the changes as a table for an issue."""
    lines = ["| change | case | was | now |", "| --- | --- | --- | --- |"]
    for each in changes(old, new):
        if each["what"] != "same":
            place = f"{each['case'].get('target', '')} {words.label(each['case'])} {each['id']}"
            cells = (each["what"], place, told(each["before"]), told(each["after"]))
            lines.append(
                "| " + " | ".join(text.printable(c).replace("|", "\\|") for c in cells) + " |"
            )
    return "\n".join(lines[:200]) + "\n"


def _row(each: Mapping[str, Any]) -> dict[str, Any]:
    sizes = [
        far[1] if case is not None and (far := words.farthest(case)) else None
        for case in (each["before"], each["after"])
    ]
    causes = panels.causes(each["after"]) if each["after"] is not None else []
    return {
        **each,
        "label": words.label(each["case"]),
        "target": each["case"].get("target", ""),
        "was": told(each["before"]),
        "now": told(each["after"]),
        "headline": words.headline(each["case"]),
        "axis": Decades.over(sizes),
        "sizes": sizes,
        "good": [
            case is not None and not words.failed(case) for case in (each["before"], each["after"])
        ],
        "fix": causes[0]["fix"] if causes and words.failed(each["case"]) else "",
        "replay": f"equivcheck replay {each['id']}" if each["after"] is not None else "",
    }
