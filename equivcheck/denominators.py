"""Denominators that a loop may divide by, wrongly: what each makes of a factor at another number of steps or counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["grouped", "of_counts", "of_steps"]


def grouped(counts: Sequence[float], shares: int) -> dict[str, list[float]]:
    """Return the counts of every micro-batch; where ranks share the batch, also those of all ranks together.

    Args:
        counts: Of rank 0's micro-batches, then of rank 1's ...
        shares: How many ranks share the batch.
    """
    found = {"": list(counts)}
    if shares > 1 and len(counts) % shares == 0:
        steps = len(counts) // shares
        found[" of all ranks"] = [sum(counts[k::steps]) for k in range(steps)]
    return found


def of_steps(k: int, other: int, scale: float, limit: float) -> dict[str, float]:
    """Return, by the rule that would explain a factor at K, what it is at another K."""
    # A denominator a + b K, that the full batch (K = 1) has too: b / a follows from one K.
    slope = (1.0 / scale - 1.0) / (k - 1.0 / scale) if abs(k * scale - 1.0) > limit else math.inf
    excess = 1.0 / scale - 1.0
    return {
        "the same at every K": scale,
        "in proportion to K": scale * other / k,
        "in inverse proportion to K": scale * k / other,
        "the denominator's excess is in proportion to K": 1.0 / (1.0 + excess * other / k),
        "the denominator's excess is in proportion to K - 1": 1.0
        / ((1.0 + excess * (other - 1) / max(k - 1, 1)) or math.inf),
        "K is counted wrong by the same number at every K": other
        / ((other + k * excess) or math.inf),
        "the denominator grows with K, and has grown in the full batch": (1.0 + slope)
        / ((1.0 + slope * other) or math.inf),
    }


def of_counts(
    mine: Sequence[float], others: Sequence[float], scale: float, limit: float
) -> dict[str, float]:
    """Return, by each denominator made of counts that explains a factor, the factor that it makes of other counts.

    Args:
        mine: What each micro-batch holds of something that is counted, in the cycle with the factor.
        others: The same in another cycle.
        scale: The factor.
        limit: What it is known to, relative.
    """
    return {
        name: sum(others) / rule(others)
        for name, rule in _DENOMINATORS.items()
        if rule(mine)
        and rule(others)
        and abs(sum(mine) / rule(mine) - scale) <= limit * max(scale, 1.0)
    }


# Made of counts, wrongly: from the counts of a cycle's micro-batches.
_DENOMINATORS: dict[str, Callable[[Sequence[float]], float]] = {
    "integer division": lambda counts: len(counts) * (sum(counts) // len(counts)),
    "rounded-up division": lambda counts: len(counts) * -(-sum(counts) // len(counts)),
    "K times the last micro-batch's count": lambda counts: len(counts) * counts[-1],
    "K times the first micro-batch's count": lambda counts: len(counts) * counts[0],
    "all counts but the first": lambda counts: sum(counts[1:]),
    "all counts but the last": lambda counts: sum(counts[:-1]),
    "the last micro-batch's count": lambda counts: counts[-1],
    "the first micro-batch's count": lambda counts: counts[0],
    "K times the largest count": lambda counts: len(counts) * max(counts),
}
