"""Axes: where a number stands on a scale of decades, in percent, so that charts fit any width."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Decades:
    """A logarithmic axis from 10**low to 10**high; an exact zero stands at its left end.

    Attributes:
        low, high: Exponents of the ends.
    """

    low: int
    high: int

    @classmethod
    def over(cls, values: Iterable[float | None], low: int = -17, high: int = 0) -> Decades:
        """Return an axis that holds all positive values, and at least the decades given."""
        found = [math.log10(v) for v in values if v is not None and v > 0 and math.isfinite(v)]
        # A tenth of a decade of room, so that no mark stands over the edge.
        ends = [math.floor(x) for x in found], [math.ceil(x + 0.1) for x in found]
        return cls(min([low, *ends[0]]), max([high, *ends[1]]))

    def place(self, value: float | None) -> float:
        """Return where a value stands, 0 to 100; infinity at the right end."""
        if value is None or value <= 0 or math.isnan(value):
            return 0.0
        if math.isinf(value):
            return 100.0
        return self._at(math.log10(value))

    def _at(self, exponent: float) -> float:
        share = (exponent - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)

    def ticks(self, most: int = 7) -> list[tuple[float, str]]:
        """Return at most so many (place, label), at whole decades evenly spaced, zero first."""
        every = max(1, math.ceil((self.high - self.low) / (most - 1)))
        exponents = range(self.high, self.low, -every)
        return [
            (0.0, "0"),
            *((self._at(e), "1" if e == 0 else f"1e{e}") for e in sorted(exponents)),
        ]


@dataclass(frozen=True)
class Plain:
    """A linear axis."""

    low: float
    high: float

    def place(self, value: float | None) -> float:
        """Return where a value stands, 0 to 100."""
        if value is None or not math.isfinite(value) or self.high == self.low:
            return 0.0
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)
