"""The losses that a script prints, read from its output: a number for every optimizer step, or none.

What a script prints is not what it trains on, and often only roughly: many print the last micro-batch's loss and know
it. So a printed loss is called wrong (EQ701) only where it is an exact multiple of the full batch's at every optimizer
step; any other difference is a warning.

K accumulation steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from equivcheck.recording import Recording

__all__ = ["Number", "differing", "losses_of"]

# A word with "loss" in it, little between it and the number: `loss 2.1`, `'train/loss': 0.3`, `Loss: 1.5e-01`.
_LOSS: Final = re.compile(
    r"([A-Za-z_][\w/.\-]*)?loss([\w/.\-]*)[^\w+\-\n]{0,6}([-+]?\d+(\.\d*)?([eE][-+]?\d+)?)(?![\w.]*[xX:/])",
    re.IGNORECASE,
)
# A loss scale is none, and neither is a count.
_OTHER: Final = ("scale", "scaling", "weight", "coef", "num", "step")
# Digits of a number behind which two different losses are not told from chance.
_SIGNIFICANT: Final = 100


@dataclass(frozen=True)
class Number:
    """A printed number.

    Attributes:
        value: What it says.
        unit: What its last digit stands for.
    """

    value: float
    unit: float


def losses_of(text: str) -> dict[str, list[Number]]:
    """Return the losses in what a script wrote, in order, by the name that stands before them."""
    found: dict[str, list[Number]] = {}
    for match in _LOSS.finditer(text):
        before, after, number, fraction, exponent = match.groups()
        name = f"{before or ''}loss{after}".lower().strip("./-")
        if any(each in name for each in _OTHER):
            continue
        digits = len(fraction) - 1 if fraction else 0
        power = int(exponent[1:]) if exponent else 0
        found.setdefault(name, []).append(Number(float(number), 10.0 ** (power - digits)))
    return found


def differing(
    full: Mapping[str, Sequence[Number]],
    accumulated: Mapping[str, Sequence[Number]],
    candidate: Recording,
    steps: int,
    accumulation_steps: int,
) -> dict[str, Any] | None:
    """Return how a loss that both runs print at every optimizer step differs, and by what rule; None if none does.

    Args:
        full: Printed losses of the full batch, by name.
        accumulated: The same of the accumulated run.
        candidate: The accumulated run, for the values that it called backward on.
        steps: Optimizer steps of each run.
        accumulation_steps: K.
    """
    found = None
    for name, wanted in full.items():
        mine = accumulated.get(name, ())
        if len(wanted) != steps or len(mine) != steps:
            continue
        if _fits(mine, wanted, 1.0):
            continue
        rule, exact = _rule(mine, wanted, candidate, accumulation_steps)
        size = max(abs(each.value) for each in wanted) or 1.0
        entry = {
            "printed_as": name,
            "relative": max(abs(a.value - b.value) for a, b in zip(mine, wanted, strict=True))
            / size,
            "logged": [each.value for each in mine][:8],
            "full_batch": [each.value for each in wanted][:8],
            "exact": exact,
        }
        if rule:
            entry["rule"] = rule
        if exact:
            return entry
        found = found or entry
    return found


def _rule(
    mine: Sequence[Number], wanted: Sequence[Number], candidate: Recording, k: int
) -> tuple[str, bool]:
    """Return the formula of a printed loss, and whether it is an exact multiple of the true one."""
    enough = all(abs(each.value) >= _SIGNIFICANT * each.unit for each in (*mine, *wanted))
    if k > 1 and enough:
        if _fits(mine, wanted, 1.0 / k):
            return "divided by accumulation_steps once too often", True
        if _fits(mine, wanted, float(k)):
            return "summed, not averaged", True
    by_step = [
        candidate.backwards[step.first_backward : step.backwards] for step in candidate.steps
    ]
    if len(by_step) == len(mine) and all(by_step):
        last = [each[-1].loss for each in by_step]
        for name, factor in (("", 1.0), (", times accumulation_steps", float(k))):
            if _fits(mine, [Number(value, 0.0) for value in last], factor):
                return f"the last backward's loss{name}", False
    return "", False


def _fits(mine: Sequence[Number], wanted: Sequence[Number], factor: float) -> bool:
    """Return whether numbers are others times a factor, to within what is printed of them."""
    return all(
        abs(a.value - factor * b.value) <= 0.51 * (a.unit + factor * b.unit)
        for a, b in zip(mine, wanted, strict=True)
    )
