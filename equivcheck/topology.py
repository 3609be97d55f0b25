"""Tell a factor of K from one of the number of ranks: which of them a gradient is off by, another K shows.

K micro-batches per cycle and rank, R ranks.
"""

from __future__ import annotations

import itertools

from equivcheck.differences import Sums
from equivcheck.errors import EquivcheckError
from equivcheck.recording import Step
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
    key = ("factor", view.chosen, view.names)
    if key not in view.experiment.remembered:
        fitting = [
            (a, b)
            for a, b in _EXPONENTS
            if (a, b) != (0, 0) and _fits_all(view, float(k) ** a * float(size) ** b)
        ]
        fitting.sort(key=lambda item: abs(item[0]) + abs(item[1]))
        if len(fitting) > 1:
            confirmed = _confirmed(view, fitting)
            least = abs(fitting[0][0]) + abs(fitting[0][1])
            simplest = [(a, b) for a, b in fitting if abs(a) + abs(b) == least]
            view.experiment.remembered["undecided", view.chosen, view.names] = (
                [] if confirmed or len(simplest) == 1 else simplest
            )
            fitting = confirmed or fitting
        view.experiment.remembered[key] = fitting[0] if fitting else None
    return view.experiment.remembered[key]  # type: ignore[no-any-return]


def undecided(view: View) -> list[tuple[int, int]]:
    """Return the factors that all fit where no run at another K can decide between them; empty if one is known.

    A loop that is given another K tells; a command line that has but one K leaves them all suspected.
    """
    factor_of(view)
    found: list[tuple[int, int]] = view.experiment.remembered.get(
        ("undecided", view.chosen, view.names), []
    )
    return [] if view.experiment.other_steps else found


def equal_parts_of(view: View) -> str | None:
    """Tell what each of the R ranks' K micro-batches counts where all count alike and K is R: "K" or "R" parts of one.

    Micro-batches that count 1 / R each are undivided, those that count 1 / K each are summed over the ranks; of those
    that count less than their mean it is told what that is divided by again. None where no run at another K tells.
    """
    experiment = view.experiment
    key = ("equal parts", view.chosen)
    if key not in experiment.remembered:
        experiment.remembered[key] = None if view.chosen else _equal_parts(view)
    return experiment.remembered[key]  # type: ignore[no-any-return]


def _equal_parts(view: View) -> str | None:
    experiment = view.experiment
    other = another(view)
    if other is None:
        return None
    try:
        at_other = View(experiment.other(other))
        attributions = at_other.divergent
    except EquivcheckError:
        return None
    size = experiment.case.world_size
    for name, count in (
        ("K", other),
        ("R", size),
        ("K, divided by R again", other * size * size),
        ("K, divided by K again", other * other * size),
    ):
        if attributions and all(
            at_other.fits(each, [1.0 / count] * each.pieces.shape[0]) for each in attributions
        ):
            return name
    return None


def _fits_all(view: View, factor: float) -> bool:
    for each in view.divergent:
        right = view.right(each)
        if right is not None:
            fits = view.fits(each, [x * factor for x in right])
        else:  # No sum of pieces makes the full batch's gradient; a multiple of it may be taken all the same.
            rest = float((each.candidate - factor * each.reference).norm())
            fits = rest <= view.tolerance(each) * float(each.candidate.norm())
        if not fits:
            return False
    return True


def _confirmed(view: View, fitting: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return those that give the factor at another K too."""
    experiment, size = view.experiment, float(view.experiment.case.world_size)
    if view.chosen:
        return []
    other = another(view)
    if other is None:
        return []
    try:
        recording = experiment.at(other)
    except EquivcheckError:  # The user's own loop may refuse another K.
        return []
    shown = view.divergent[0]
    measured = [
        overall(_looked_at(view, each)).scale
        for each in recording.steps
        if each.matched == shown.matched and _looked_at(view, each)
    ]
    limit = view.tolerance(shown)
    return [
        (a, b)
        for a, b in fitting
        if measured and abs(measured[0] / (float(other) ** a * size**b) - 1.0) <= limit
    ]


def _looked_at(view: View, step: Step) -> dict[str, Sums]:
    """Return the sums of those gradients that a view looks at: others may be right, or off by another factor."""
    return {n: each for n, each in step.gradients.items() if view.names is None or n in view.names}


def another(view: View) -> int | None:
    """Return another K, one that cuts the batches evenly if there is one: a mean then stays a pure factor."""
    steps, shares = view.steps, view.experiment.case.shares
    rows = view.experiment.data.rows
    possible = [k for k in (2, 3, 2 * steps) if k != steps and k * shares <= max(rows)]
    return min(possible, key=lambda k: max(rows) % (k * shares) != 0, default=None)
