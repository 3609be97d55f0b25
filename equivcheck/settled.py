"""Parameters where the loop leaves them: looked at when the next optimizer step begins, and at the end of the run.

A loop may let every rank step with its own gradient and average the parameters afterwards. With plain SGD, with
momentum too, that is the update that the full batch gives, although no rank steps with the full batch's gradient. Such
a run is left to itself: what is set to the reference's state right after a step would be averaged in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from torch.optim import Optimizer

from equivcheck.comparers import Comparer, updated
from equivcheck.observe import measured
from equivcheck.recording import Recording, Step
from equivcheck.verdict import Judgement, Noise, update_limit

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

# What is seen at the step itself, before the loop has done with it.
AT_THE_STEP: Final = frozenset({"gradients", "applied", "none", "parameters", "state"})


class Settled(Comparer):
    """Compares parameters with the reference's once the loop has done with a step, and sets nothing.

    Args:
        reference: The recording that was kept.
    """

    def __init__(self, reference: Recording) -> None:
        super().__init__(reference)
        self._last: Step | None = None

    def before(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        """Compare what the step before has become."""
        super().before(recorder, step, optimizer)
        # Of several optimizers that step on the same backwards the last is followed by what the loop does then.
        if self._last is not None and step.backwards > self._last.backwards:
            self._compare(recorder, self._last)

    def after(self, _recorder: Recorder, step: Step, _optimizer: Optimizer) -> None:
        """Set nothing: the loop goes on from where it is."""
        self._last = step

    def finish(self, recorder: Recorder) -> None:
        """Compare what the last step has become."""
        if self._last is not None:
            self._compare(recorder, self._last)

    def _compare(self, recorder: Recorder, step: Step) -> None:
        self._last = None
        if step.matched is None:
            return
        kept = self._reference.kept[step.matched]
        step.parameters = measured([(*each, None) for each in updated(recorder, kept)])
        kept.release()


def sends_after_steps(ranks: Sequence[Recording], kind: str = "") -> bool:
    """Return whether some rank sends something between an optimizer step and the backward that follows it.

    Args:
        ranks: What each rank saw.
        kind: A part of the collective's name; empty for all.
    """
    for each in ranks:
        for step in each.steps:
            following = each.backwards[step.backwards : step.backwards + 1]
            end = following[0].at if following else math.inf
            if any(step.at <= s.at < end and kind in s.kind for s in each.collectives):
                return True
    return False


def judged_as_left(
    judgement: Judgement, reference: Recording, left: Recording, noise: Noise
) -> Judgement:
    """Return a judgement without what is seen at the steps, if the parameters agree once the loop has done with them.

    Args:
        judgement: Of the run that was set to the reference's state after every step.
        reference: The kept run.
        left: The run that a `Settled` has compared; its differences add up from step to step.
        noise: What correct code may show.
    """
    margin = math.inf
    if not left.steps or not left.steps[-1].parameters:
        return judgement
    for step in left.steps:
        if step.matched is None:
            return judgement
        for name, each in step.parameters.items():
            limit = (1 + step.matched) * update_limit(
                reference, noise, step.matched, "parameters", name, each
            )
            if not each.finite or each.difference_norm > limit:
                return judgement
            if each.difference_norm:
                margin = min(margin, limit / each.difference_norm)
    findings = [each for each in judgement.findings if each.kind not in AT_THE_STEP]
    return replace(judgement, findings=findings, margin=margin, left=left)
