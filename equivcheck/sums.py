"""Sums of gradients that a loop keeps itself, and never starts anew: EQ302 where `zero_grad` has no part in it.

A step's gradient is compared with that of its full batch alone, from the same state. What is left is the gradient of
the step before, whole: it was never taken out of the sum.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch

from equivcheck.attribution import solve
from equivcheck.errors import EquivcheckError
from equivcheck.fit import flat

if TYPE_CHECKING:
    from equivcheck.experiment import Experiment
    from equivcheck.recording import Step

# Steps that are run alone: one shows the rule, another that it holds.
STEPS: Final = 2
# What is not in the span of a step's own backwards by more than this is no rounding, not even bfloat16's.
FOREIGN: Final = 0.05
# A weight that is 1 to so many parts is 1: weights come out of fits of gradients that agree to 1e-12 and better.
EXACT: Final = 1e-6


def weight_of_earlier(experiment: Experiment, step: Step, earlier: Step) -> float | None:
    """Return how much of an earlier step's gradient is in a step's, whose full batch alone is in it once.

    Args:
        experiment: The runs of the case.
        step: A step of the full-batch run, or of the accumulated one.
        earlier: The step of the same optimizer before it.

    Returns:
        The weight; None if the gradient is not the sum of the two.
    """
    assert step.matched is not None
    alone = _alone(experiment, step.optimizer, step.matched)
    if alone is None:
        return None
    names = [(name, len(s)) for name, s in step.sample.items() if s is not None]
    target = flat(step, names)
    fit = solve(torch.stack([flat(alone, names), flat(earlier, names)]), target)
    own, before = fit.values
    if fit.residual is None or fit.residual > EXACT or own is None or before is None:
        return None
    return before if abs(own - 1.0) <= EXACT else None


def kept_sums(experiment: Experiment) -> dict[str, Any] | None:
    """Return the evidence that a loop's own sums still hold the gradient of the step before, whole; None if not."""
    if "kept sums" not in experiment.remembered:
        experiment.remembered["kept sums"] = _kept_sums(experiment)
    return experiment.remembered["kept sums"]  # type: ignore[no-any-return]


def _kept_sums(experiment: Experiment) -> dict[str, Any] | None:
    reference = experiment.reference()
    if (
        not experiment.other_steps
        or experiment.case.world_size > 1
        or "dataset" in experiment.wants
        or not _suspect(experiment)
    ):
        return None
    for key in reference.optimizers:
        steps = [step for step in reference.steps if step.optimizer == key and not step.skipped]
        pairs = list(itertools.pairwise(steps))[:STEPS]
        weights = [weight_of_earlier(experiment, step, earlier) for earlier, step in pairs]
        if pairs and all(w is not None and abs(w - 1.0) <= EXACT for w in weights):
            return {
                "because": "the loop keeps sums of gradients of its own and adds to them without end",
                "fix": "set the sums to zero after every optimizer step",
                "relative": _share_of_earlier(*pairs[0]),
                "weight_of_earlier_gradients": weights,
                "optimizer_step": pairs[0][1].index,
            }
    return None


def _share_of_earlier(earlier: Step, step: Step) -> float:
    return earlier.norm / step.norm if step.norm else 0.0


def _suspect(experiment: Experiment) -> bool:
    """Return whether gradients at a step are others than its backwards made: in place of them, or beside them."""
    reference = experiment.reference()
    if any(step.handed_over for step in reference.steps[1:]):
        return True
    if not experiment.has_native:
        return False
    for step in experiment.native("native_candidate").steps[1:]:
        names = [(name, len(s)) for name, s in step.sample.items() if s is not None]
        if step.skipped or not step.contributions or not names:
            continue
        rows = [
            torch.cat([each.get(n, torch.zeros(size, dtype=torch.float64)) for n, size in names])
            for each in step.contributions
        ]
        residual = solve(torch.stack(rows), flat(step, names)).residual
        if residual is not None and residual > FOREIGN:
            return True
    return False


def _alone(experiment: Experiment, optimizer: str, matched: int) -> Step | None:
    """Return the step that a full batch makes alone."""
    samples = experiment.reference().steps[matched].samples
    rows = experiment.data.full_batches()
    index = next(
        (i for i, row in enumerate(rows) if {(0, sample) for sample in row} == set(samples)), None
    )
    if index is None:
        return None
    try:
        recording = experiment.full_batch_alone(index)
    except EquivcheckError:
        return None
    found = [step for step in recording.steps if step.optimizer == optimizer]
    return found[0] if len(found) == 1 else None
