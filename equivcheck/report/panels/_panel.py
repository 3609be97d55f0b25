"""What a panel is, and how it prints a value."""

from __future__ import annotations

from typing import Any

# Plain data for a template; None where a result does not have it, and the page leaves the panel out.
Panel = dict[str, Any] | None


def short(value: Any) -> str:
    """Return a value of the result with at most four digits."""
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(short(each) for each in value[:4])
    return f"{value:.4g}" if isinstance(value, float) else str(value)
