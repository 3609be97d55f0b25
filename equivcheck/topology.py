"""Tell a factor of K from one of the number of ranks: which of them a gradient is off by, another K shows.

K micro-batches per cycle and rank, R ranks.
"""

from __future__ import annotations

import itertools

from equivcheck.errors import EquivcheckError
from equivcheck.verdict import overall
from equivcheck.view import View

# Exponents of K and R in the factors that a loop may be off by: divided or not, averaged or not, or twice.
_EXPONENTS = [
    (a, b) for a, b in itertools.product((0, 1, -1), (0, 1, -1, 2, -2)) if a == 0 or abs(b) < 2
]


def factor_of(view: View) -> tuple[int, int] | None:
    """Return (a, b) if every gradient that differs is K**a * R**b times what it should be; None if it is not.

    Where several fit, a run at another K decides; where that cannot be made, the simplest is returned.
    """
    size, k = view.experiment.case.world_size, view.steps
    if size == 1 or not view.divergent:
        return None
    key = ("factor", view.chosen)
    if key not in view.experiment.remembered:
        fitting = [
            (a, b)
            for a, b in _EXPONENTS
            if (a, b) != (0, 0) and _fits_all(view, float(k) ** a * float(size) ** b)
        ]
        fitting.sort(key=lambda item: abs(item[0]) + abs(item[1]))
        if len(fitting) > 1:
            fitting = _confirmed(view, fitting) or fitting
        view.experiment.remembered[key] = fitting[0] if fitting else None
    return view.experiment.remembered[key]  # type: ignore[no-any-return]


def _fits_all(view: View, factor: float) -> bool:
    for each in view.divergent:
        right = view.right(each)
        if right is None or not view.fits(each, [x * factor for x in right]):
            return False
    return True


def _confirmed(view: View, fitting: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return those that give the factor at another K too."""
    experiment, size = view.experiment, float(view.experiment.case.world_size)
    other = 2 if view.steps != 2 else 3
    if view.chosen or other * experiment.case.shares > min(experiment.data.rows):
        return []
    try:
        recording = experiment.at(other)
    except EquivcheckError:  # The user's own loop may refuse another K.
        return []
    shown = view.divergent[0]
    measured = [
        overall(each.gradients).scale
        for each in recording.steps
        if each.matched == shown.matched and each.gradients
    ]
    limit = view.tolerance(shown)
    return [
        (a, b)
        for a, b in fitting
        if measured and abs(measured[0] / (float(other) ** a * size**b) - 1.0) <= limit
    ]
