"""What the plugin says: the section in a test's report, and the summary at the end."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from equivcheck.causes import name_of
from equivcheck.plugin.facts import Reports
from equivcheck.report import text
from equivcheck.report import words as shared

WIDTH = text.WIDTH
SHORT = 20  # rows of a table of parameters without -v
IN_BLOCK = 5  # rows that the failure's own text has


def section(cases: Sequence[Mapping[str, Any]], notes: Sequence[str], *, full: bool) -> str:
    """Return a line for each case, its parameters where they differ, and what was left out."""
    lines: list[str] = []
    for case in cases:
        lines.append(text.line(case))
        rows = shared.worst_parameters(case, 200 if full else SHORT)
        if shared.failed(case) and len(rows) > IN_BLOCK:
            lines.append(f"    {'parameter':<40}{'relative':>10}{'scale':>10}{'cosine':>10}")
            for row in rows:
                name = str(row["name"])
                shown = name if len(name) < 40 else name[:36] + "..."
                values = shared.number(row.get("relative")), *map(shared.factor, _pair(row))
                lines.append(
                    f"    {text.printable(shown):<40}" + "".join(f"{v:>10}" for v in values)
                )
            more = len(case.get("per_parameter") or ()) - len(rows)
            if more > 0:
                lines.append(f"    {more} more with -v or in the result")
    lines += [f"  note  {note}" for note in notes]
    return "\n".join(lines)


def _pair(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return row.get("scale"), row.get("cosine")


def summary(reports: Reports, *, paths: Sequence[str]) -> list[str]:
    """Return the summary: one line if every check is as it should be, else what is wrong and how to repeat it.

    A divergence in a test that passes, or that is expected to fail, is not news.
    """
    found = [
        {**case, "test": test, "outcome": reports.outcome(test)}
        for test, cases in reports.facts.items()
        for case in cases
    ]
    lines: list[str] = []
    wrong = [case for case in found if case.get("failed") and case["outcome"] == "failed"]
    for cause, group in _by_cause(wrong).items():
        lines += _block(cause, group)
    rest = [case for case in found if case not in wrong]
    if rest:
        lines.append(_counts(rest))
    lines += [f"never called: the fixture of {test}" for test in reports.unused]
    lines += [f"report    {path}" for path in paths]
    return lines


def _by_cause(cases: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        missing = case.get("missing")
        absent = f"declared {missing.replace(',', ', ')} not found" if missing else case["verdict"]
        groups.setdefault(str(case.get("cause", "")).split(",")[0] or absent, []).append(case)
    return groups


def _block(cause: str, cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cause, how often it was found, its first headline and the command that repeats it."""
    tests = len({case["test"] for case in cases})
    name = f" {name_of(cause)}" if cause.startswith("EQ") else ""
    count = f"{len(cases)} case{'s' * (len(cases) > 1)} in {tests} test{'s' * (tests > 1)}"
    told = str(cases[0].get("headline", "")).removeprefix(f"{cause}{name}: ")
    lines = [f"{cause}{name}: {count}"]
    lines += textwrap.wrap(
        text.printable(told), WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10
    )
    if cases[0].get("replay"):
        lines.append(f"replay    {cases[0]['replay']}")
    return lines


def _counts(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return `equivcheck: 18 cases equivalent, 1 expected (EQ201), margin >= 36x`."""
    kinds: Counter[str] = Counter()
    for case in cases:
        shown = case["verdict"]
        if shown != "equivalent" and case.get("cause"):
            shown += f" ({case['cause']})"
        if case.get("missing"):
            shown += f" (declared {case['missing'].replace(',', ', ')} not found)"
        if case["outcome"] == "failed":
            shown += " in a test that failed"
        elif case["outcome"] != "passed":
            shown = f"{case['outcome']}: {shown}"
        elif case.get("failed"):
            shown = f"measured as {shown}"
        kinds[shown] += 1
    told = ", ".join(
        f"{count} case{'s' * (count > 1)} {kind}" if not number else f"{count} {kind}"
        for number, (kind, count) in enumerate(kinds.items())
    )
    margins = [float(case["margin"]) for case in cases if case.get("margin") is not None]
    return f"equivcheck: {told}" + (f", margin >= {shared.times(min(margins))}" if margins else "")
