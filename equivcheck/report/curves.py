"""Paths of lines in a square of 100 by 100, stretched to any width by whoever draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from equivcheck.report.scales import Decades, Plain

Axis = Decades | Plain


def places(x: Sequence[float]) -> list[float]:
    """Return where the points of an axis stand, 0 to 100; a lone one in the middle."""
    if len(x) == 1:
        return [50.0]
    axis = Plain(x[0], x[-1])
    return [axis.place(value) for value in x]


def points(
    x: Sequence[float], values: Sequence[float | None], axis: Axis
) -> list[tuple[float, float]]:
    """Return (x, height) of every value there is, 0 to 100."""
    return [(a, axis.place(v)) for a, v in zip(places(x), values, strict=True) if v is not None]


def path(x: Sequence[float], values: Sequence[float | None], axis: Axis) -> str:
    """Return the SVG path through the values, broken where one is absent; a lone one as a dash."""
    found: list[str] = []
    pen = "M"
    for a, value in zip(places(x), values, strict=True):
        if value is None:
            pen = "M"
            continue
        found.append(f"{pen}{_n(a)} {_n(100 - axis.place(value))}")
        pen = "L"
    if len(found) == 1:
        height = found[0].split()[1]
        return f"M0 {height}L100 {height}"
    return "".join(found)


def area(x: Sequence[float], values: Sequence[float | None], axis: Axis) -> str:
    """Return the path around everything below the values."""
    shown = [(a, v) for a, v in zip(places(x), values, strict=True) if v is not None]
    if not shown:
        return ""
    if len(shown) == 1:
        shown = [(0.0, shown[0][1]), (100.0, shown[0][1])]
    top = "L".join(f"{_n(a)} {_n(100 - axis.place(v))}" for a, v in shown)
    return f"M{_n(shown[0][0])} 100L{top}L{_n(shown[-1][0])} 100Z"


def drawn(start: dict[str, Any]) -> dict[str, Any]:
    """Return the panel of the first divergence with the paths of its lines."""
    x, axis = start["x"], start["axis"]
    found = {
        **start,
        "lines": [
            {
                **line,
                "path": path(x, line["values"], axis),
                "points": points(x, line["values"], axis),
            }
            for line in start["lines"]
        ],
        "area": area(x, start["noise"], axis) if start["noise"] else "",
        "allowed_path": path(x, start["allowed"], axis) if start["allowed"] else "",
        "pairs": [],
    }
    for pair in start["pairs"]:
        known = [
            v
            for v in (*pair["full_batch"], *pair["accumulated"])
            if v is not None and math.isfinite(v)
        ]
        if not known:
            continue
        low, high = min(known), max(known)
        span = (high - low) or abs(high) or 1.0
        scale = Plain(low - 0.1 * span, high + 0.1 * span)
        found["pairs"].append(
            {
                **pair,
                "full_path": path(x, pair["full_batch"], scale),
                "acc_path": path(x, pair["accumulated"], scale),
                "low": f"{low:.4g}",
                "high": f"{high:.4g}",
            }
        )
    return found


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
