"""Clips that are no call and leave no trace in `.grad`: EQ306, by hooks on gradients and in buffers of the loop's own.

What clips is the one thing a loop does to a gradient that depends on its size and does nothing to a small one.
"""

from __future__ import annotations

from typing import Final

import torch

from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Shrink
from equivcheck.recording import Recording
from equivcheck.view import Suspicion, View

# A power of two rounds nothing; sums in another order are exact to within some 1e-14.
_LINEAR: Final = 1e-6


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion where gradients differ that are not in proportion to the loss, as smaller ones are."""
    finding = view.judgement.first("gradients", "applied")
    if finding is None or view.experiment.case.world_size > 1 or clipped_nowhere(view):
        return []
    evidence: dict[str, object] = {
        "because": "gradients are clipped by hand, or by a hook, before they are added up: gradients too small to be "
        "clipped add up to the full batch's"
    }
    return [Suspicion("EQ306", [(Shrink(),)], evidence, finding.matched, 46, is_guess=True)]


def clipped_nowhere(view: View) -> bool:
    """Return whether all gradients of the first optimizer step are in proportion to what enters the backward."""
    key = ("clipped nowhere", view.chosen)
    known = view.experiment.remembered
    if key not in known:
        known[key] = _linear(view)
    return known[key]  # type: ignore[no-any-return]


def _linear(view: View) -> bool:
    if any(isinstance(each, Shrink) for each in view.chosen):
        return True
    small = (*view.chosen, Shrink())
    try:
        return not (
            _changed(view.candidate, view.experiment.candidate(small))
            or _changed(view.reference, view.experiment.reference(small))
        )
    except EquivcheckError:
        return True


def _changed(as_written: Recording, small: Recording) -> bool:
    """Return whether the first step's gradients, given their size back, are not what they were."""
    if not as_written.steps or not small.steps:
        return False
    before, after = as_written.steps[0].sample, small.steps[0].sample
    pairs = [
        (b, a) for name, b in before.items() if b is not None and (a := after.get(name)) is not None
    ]
    if not pairs:
        return False
    whole = torch.cat([b.flatten() for b, _ in pairs])
    found = torch.cat([a.flatten() for _, a in pairs])
    # Where a call clips, gradients are looked at before it, and so before they have their size back.
    rest = min(float((found * size - whole).norm()) for size in (1.0, 1.0 / Shrink.FACTOR))
    return rest > _LINEAR * float(whole.norm())
