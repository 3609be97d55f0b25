"""What a loop carries from one micro-batch to the next in variables of its own: EQ309.

A running mean of rewards, the centre of a teacher's outputs, a queue: no hook sees such a variable, and nothing can set
it back. A run that begins with a micro-batch has it as the cycle has it at its beginning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equivcheck.attribution import predict, solve
from equivcheck.fit import BEYOND_ROUNDING, flat
from equivcheck.interventions import Rewind
from equivcheck.view import Suspicion, View, within


def suspect(view: View) -> list[Suspicion]:
    """Return the suspicion, proved, where micro-batches as the first of all make the full batch, and others do not."""
    if view.chosen or not any(each.matched == 0 for each in view.divergent):
        return []
    carried = Carried.of(view)
    if carried is None or carried.right is None:
        return []
    # With the weights that make the full batch of them, and in the accumulated run the micro-batches as they are there.
    made = predict(carried.behind, carried.right)
    copies = _advancing_copies(view)
    if _apart(made, carried.accumulated) > BEYOND_ROUNDING and (
        copies is None or _apart(made, copies) > BEYOND_ROUNDING
    ):
        return []
    changes = [_apart(a, b) for a, b in zip(carried.behind, carried.first, strict=True)]
    step = next(k for k, each in enumerate(changes) if each > BEYOND_ROUNDING)
    found = Suspicion(
        "EQ309",
        evidence={
            "differing_micro_step": step,
            "relative": changes[step],
            "each_as_the_first": "they add up to the full batch's gradient",
            "because": f"micro_step {step} gives another gradient after the micro-batches before it than as the first "
            "of a run: the loop keeps a variable (a running mean, a coefficient) that every micro-batch moves on",
            "fix": "move it on once per optimizer step, by what the whole cycle gave",
        },
        rank=33,
        proved=True,
    )
    found.explains = frozenset({"gradients", "applied", "parameters", "state"})
    if copies is not None:
        found.explains |= {"shadows"}
        found.evidence["beside"] = "copies of the weights, which every micro-batch moves on too"
    return [found]


def _advancing_copies(view: View) -> torch.Tensor | None:
    """Return the first gradient with copies of the weights that advance once per cycle; None if they do so anyway."""
    if not view.judgement.first("shadows"):
        return None
    once = (Rewind("shadows", "counts"),)
    if view.experiment.judgement(once).first("shadows"):
        return None  # Something else is wrong with them.
    attributions = view.experiment.attributions(once)
    return next((each.candidate for each in attributions if each.matched == 0), None)


@dataclass(frozen=True)
class Carried:
    """Micro-batches of the first cycle that depend on those before them.

    Attributes:
        behind: [K, n] what each gives alone, one behind the other in one run.
        first: [K, n] what each gives in a run that begins with it.
        accumulated: [n] the gradient of the accumulated run.
        right: The weights that make the full batch of `first`; None if none do.
    """

    behind: torch.Tensor
    first: torch.Tensor
    accumulated: torch.Tensor
    right: list[float] | None

    @classmethod
    def of(cls, view: View) -> Carried | None:
        """Return what the loop carries on, or None where micro-batches do not depend on those before them.

        Raises:
            EquivcheckError: Micro-batches cannot be run alone.
        """
        found = view.experiment.attributions(view.chosen)
        alone = next((each for each in found if each.matched == 0), None)
        if alone is None:
            return None
        optimizer = view.candidate.steps[alone.step].optimizer
        rows: list[torch.Tensor] = []
        for k in reversed(range(alone.pieces.shape[0])):
            steps = view.experiment.begun_with(k)
            own = next((step for step in steps if step.optimizer == optimizer), None)
            if own is None:
                return None
            rows.insert(0, flat(own, alone.names))
            # The last one has the most behind it.
            if len(rows) == 1 and _apart(alone.pieces[k], rows[0]) <= BEYOND_ROUNDING:
                return None
        first = torch.stack(rows)
        weights = solve(first, alone.reference)
        right = weights.solution if within(weights) else None
        return cls(alone.pieces, first, alone.candidate, right)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm()) / (float(b.norm()) or 1.0)
