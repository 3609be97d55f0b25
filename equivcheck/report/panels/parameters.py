"""The parameters: one row each, and a heatmap of their modules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from equivcheck.report import words
from equivcheck.report.panels._panel import Panel
from equivcheck.report.scales import Decades

# What a template may ask of a row; older results have fewer keys.
_ROW = dict.fromkeys(
    ("name", "optimizer_step", "relative", "multiple", "scale", "cosine", "norm", "zero")
)


def parameters(case: Mapping[str, Any]) -> Panel:
    """Return one row per parameter, worst first, and the heatmap of modules over steps."""
    table = [_ROW | dict(row) for row in case.get("per_parameter") or ()]
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
    off = sum(bool(row["beyond"]) for row in table)
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
        told += (
            f"; {zero} ha{'s' if zero == 1 else 've'} a gradient that is zero but for rounding (~0)"
        )
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
        for begin, end in itertools.pairwise(edges):
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
