"""A whole run at a glance: workloads against axes, and counts by verdict and cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from equivcheck.report import words

WIDTH = 80
_NAME = 26
_CELL = 5
_SPLITS = {"even": "", "uneven": "u"}

Paint = Callable[[str, str], str]


def table(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the matrix of the cases that belong to workloads, JSON-ready; None if none does.

    Returns:
        `columns`: labels; `rows`: for each workload its suite, name, smallest margin of what is equivalent, and
        `cells`, one per column: null, or `{"id", "verdict", "causes", "failed"}`.
    """
    ours = [case for case in cases if case.get("workload")]
    if not ours:
        return None
    columns = sorted({_place(case) for case in ours})
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case in ours:
        key = (str(case["target"]), str(case["workload"]))
        row = rows.setdefault(
            key,
            {"suite": key[0], "workload": key[1], "margin": None, "cells": [None] * len(columns)},
        )
        row["cells"][columns.index(_place(case))] = {
            "id": case["id"],
            "verdict": case["verdict"],
            "causes": words.codes(case),
            "failed": words.failed(case),
        }
        margin = case.get("margin")
        if case["verdict"] == "equivalent" and margin is not None:
            row["margin"] = margin if row["margin"] is None else min(row["margin"], margin)
    return {"columns": [_label(place) for place in columns], "rows": list(rows.values())}


def counts(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Return how many cases there are by verdict, and by cause."""
    return {
        "verdicts": dict(Counter(str(case["verdict"]) for case in cases).most_common()),
        "causes": dict(sorted(Counter(c for case in cases for c in words.codes(case)).items())),
    }


def render(result: Mapping[str, Any], paint: Paint = lambda text, _: text) -> str:
    """Return the matrix as text of at most 80 columns, a block for each suite; empty without workloads.

    `ok` is equivalent; a code is a divergence that theory predicts, `!` before a cell a result that it does not.
    """
    whole = table(result["cases"])
    if whole is None:
        return ""
    lines: list[str] = []
    for suite in dict.fromkeys(row["suite"] for row in whole["rows"]):
        rows = [row for row in whole["rows"] if row["suite"] == suite]
        used = [i for i in range(len(whole["columns"])) if any(row["cells"][i] for row in rows)]
        across = (WIDTH - _NAME - 9) // (_CELL + 1)
        for start in range(0, len(used), across):
            chosen = used[start : start + across]
            head = "".join(f" {whole['columns'][i]:>{_CELL}}" for i in chosen)
            lines += ["", f"{_cut(suite, _NAME):<{_NAME}}{head}   margin"]
            for row in rows:
                if any(row["cells"][i] for i in chosen):
                    lines.append(_line(row, chosen, paint))
    found = counts(result["cases"])
    lines += ["", "ok is equivalent, EQnnn what theory predicts, ! what it does not"]
    lines += ["", "verdicts  " + ", ".join(f"{n} {name}" for name, n in found["verdicts"].items())]
    if found["causes"]:
        told = [f"{n} {code}" for code, n in found["causes"].items()]
        lines += _filled("causes    ", told)
    return "\n".join(lines)


def _line(row: Mapping[str, Any], chosen: Sequence[int], paint: Paint) -> str:
    cells = "".join(" " + _cell(row["cells"][index], paint) for index in chosen)
    margin = words.times(row["margin"]) if row["margin"] is not None else "-"
    return f"{'  ' + _cut(row['workload'], _NAME - 3):<{_NAME}}{cells} {margin:>8}"


def _cell(cell: Mapping[str, Any] | None, paint: Paint) -> str:
    if cell is None:
        return " " * _CELL
    causes = cell["causes"]
    shown = causes[0] if causes else _SHORT.get(cell["verdict"], cell["verdict"])
    if len(causes) > 1:
        shown = f"{causes[0][2:]}+{len(causes) - 1}"
    if cell["failed"]:
        return paint(f"{'!' + shown.removeprefix('EQ'):>{_CELL}}"[:_CELL], "31;1")
    return paint(f"{shown:>{_CELL}}"[:_CELL], "32" if cell["verdict"] == "equivalent" else "36")


_SHORT = {
    "equivalent": "ok",
    "expected": "theory",
    "divergent": "differ",
    "precision-loss": "loss",
    "inconclusive": "incon",
    "invalid": "inval",
}


def _place(case: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what sorts the columns: ranks and strategy, split, K."""
    return (
        case.get("world_size") or 1,
        case.get("strategy") or "none",
        _SPLITS.get(str(case.get("split")), str(case.get("split"))),
        case["accumulation_steps"],
    )


def _label(place: tuple[Any, ...]) -> str:
    ranks, _, split, steps = place
    return f"K{steps}{split}" + (f"x{ranks}" if ranks > 1 else "")


def _cut(text: str, width: int) -> str:
    return text if len(text) < width else text[: width - 3] + ".."


def _filled(title: str, items: Sequence[str]) -> list[str]:
    lines, line = [], title
    for item in items:
        if len(line) + len(item) + 2 > WIDTH and line.strip() and line != title:
            lines.append(line.rstrip(", "))
            line = " " * len(title)
        line += f"{item}, "
    return [*lines, line.rstrip(", ")]
