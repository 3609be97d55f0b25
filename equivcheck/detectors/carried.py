"""What a loop carries from one micro-batch to the next in variables of its own: EQ309.

A running mean of rewards, the centre of a teacher's outputs, a queue: no hook sees such a variable, and nothing can set
it back. A run that begins with a micro-batch has it as the cycle has it at its beginning.
"""

from __future__ import annotations

import torch

from equivcheck.attribution import predict, solve
from equivcheck.fit import BEYOND_ROUNDING, Attribution, flat
from equivcheck.view import Suspicion, View, within


def suspect(view: View) -> list[Suspicion]:
    """Return the suspicion, proved, where micro-batches as the first of all make the full batch, and others do not."""
    first = next((each for each in view.divergent if each.matched == 0), None)
    if first is None or view.chosen:
        return []
    pieces = begun_with(view, first)
    if pieces is None or not depends_on_others(first, pieces):
        return []
    right = solve(pieces, first.reference)
    if not within(right):
        return []
    # With the weights that make the full batch of them, and in the accumulated run the micro-batches as they are there.
    made = predict(first.pieces, right.solution)
    if _apart(made, first.candidate) > BEYOND_ROUNDING:
        return []
    later = next(
        k for k, changed in enumerate(_changes(first, pieces)) if changed > BEYOND_ROUNDING
    )
    found = Suspicion(
        "EQ309",
        evidence={
            "micro_step": later,
            "relative": _apart(first.pieces[later], pieces[later]),
            "begun_with_each": "their sum is the full batch's gradient",
            "because": f"micro_step {later} gives another gradient behind the micro-batches before it than a run that "
            "begins with it: the loop carries something on that they move",
            "fix": "move it on once per optimizer step, from what the whole cycle gave",
        },
        rank=33,
        proved=True,
    )
    found.explains = frozenset({"gradients", "applied", "parameters", "state"})
    return [found]


def begun_with(view: View, first: Attribution) -> torch.Tensor | None:
    """Return [K, n] the gradients of the first cycle's micro-batches, each in a run that begins with it."""
    key = view.candidate.steps[first.step].optimizer
    found = []
    for steps in view.experiment.begun_with_each():
        own = [step for step in steps if step.optimizer == key]
        if not own:
            return None
        found.append(flat(own[0], first.names))
    return torch.stack(found) if len(found) == first.pieces.shape[0] else None


def depends_on_others(first: Attribution, pieces: torch.Tensor) -> bool:
    """Return whether any micro-batch gives another gradient behind others than as the first of a run."""
    return max(_changes(first, pieces)) > BEYOND_ROUNDING


def _changes(first: Attribution, pieces: torch.Tensor) -> list[float]:
    return [_apart(a, b) for a, b in zip(first.pieces, pieces, strict=True)]


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm()) / (float(b.norm()) or 1.0)
