"""What ranks send each other, by optimizer step and by backward; and EQ503, which is a warning."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Final

from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment
from equivcheck.interventions import SynchroniseOnce
from equivcheck.recording import Collective, Recording

# A backward whose reductions carry less than this share of the last one's carries counts, not gradients.
GRADIENTS: Final = 0.5
# What to do about it where the catalogue's words, which are DDP's, do not fit.
SHARDED: Final = (
    "model.set_requires_gradient_sync(False) for all micro-batches but the last (FSDP1: model.no_sync()); "
    "each rank then keeps whole gradients in between"
)
BY_HAND: Final = "reduce once, after the last backward of the cycle"
# Strategies in which every micro-batch has to send something are left alone.
JUDGED: Final = frozenset({"none", "ddp", "zero", "fsdp"})


def by_step(recording: Recording) -> list[list[Collective]]:
    """Return the collectives of each optimizer step of one rank: from the end of the one before to its own."""
    ends = [step.at for step in recording.steps]
    begins = [recording.backwards[0].at if recording.backwards else 0, *ends][: len(ends)]
    return [
        [each for each in recording.collectives if begin <= each.at < end]
        for begin, end in zip(begins, ends, strict=True)
    ]


def reductions(recording: Recording) -> list[list[list[Collective]]]:
    """Return, per optimizer step and backward of one rank, the all-reduces and reduce-scatters that it sent."""
    found = []
    for step in recording.steps:
        backwards = recording.backwards[step.first_backward : step.backwards]
        edges = [each.at for each in backwards] + [step.at]
        found.append(
            [
                [c for c in recording.collectives if a <= c.at < b and "reduce" in c.kind]
                for a, b in pairwise(edges)
            ]
        )
    return found


def redundant(experiment: Experiment) -> dict[str, Any] | None:
    """Return the evidence of EQ503 if gradients are reduced in more than one backward of a cycle; with its fix.

    Args:
        experiment: Its accumulated run made the same update as the full batch.
    """
    if experiment.case.strategy not in JUDGED or experiment.case.accumulation_steps == 1:
        return None
    shown = _first(experiment.native("native_candidate"))
    if shown is None:
        return None
    step, sent = shown
    evidence: dict[str, Any] = {
        "optimizer_step": step,
        "count": sum(len(each) for each in sent),
        "bytes": sum(c.bytes for each in sent for c in each),
        "minimum_count": len(sent[-1]),
        "minimum_bytes": sum(c.bytes for c in sent[-1]),
    }
    once = (SynchroniseOnce(),)
    try:
        same = experiment.judgement(once, logged=False).same
        evidence["proved"] = same and _first(experiment.candidate(once)) is None
    except EquivcheckError:
        evidence["proved"] = False
    if experiment.case.strategy == "fsdp":
        evidence["fix"] = SHARDED
    elif not evidence["proved"]:
        evidence["fix"] = BY_HAND
    return evidence


def _first(recording: Recording) -> tuple[int, list[list[Collective]]] | None:
    """Return the first optimizer step in which gradients are reduced more than once.

    The first step of all is passed over where there are others: DDP then sets its buckets up.
    """
    steps = list(enumerate(reductions(recording.ranks[0])))
    for step, sent in steps[1:] or steps:
        sizes = [sum(c.bytes for c in each) for each in sent]
        if len(sizes) > 1 and sizes[-1] and max(sizes[:-1]) >= GRADIENTS * sizes[-1]:
            return step, sent
    return None
