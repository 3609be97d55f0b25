"""Gradients that are not zeroed, EQ302, where that makes the two runs differ too."""

from __future__ import annotations

from equivcheck.interventions import Fresh
from equivcheck.sums import STEPS, kept_sums, weight_of_earlier
from equivcheck.view import Suspicion, View

EXPLAINED = frozenset({"gradients", "applied", "parameters", "state"})


def suspect(view: View) -> list[Suspicion]:
    """Return EQ302 where the accumulated run begins cycles with old gradients, or a loop's own sums still hold some."""
    return [*_left(view), *_kept(view)]


def _left(view: View) -> list[Suspicion]:
    """EQ302 in the accumulated run alone, on some of its ranks, or in the full batch too, beside another fault."""
    finding = view.judgement.first("gradients", "applied")
    if finding is None:
        return []
    runs = view.candidate.ranks or [view.candidate]
    left = [sum(event.kind == "leftover" for event in each.timeline) for each in runs]
    if not any(left):
        return []
    evidence: dict[str, object] = {
        "cycles_begun_with_gradients": left if len(left) > 1 else left[0]
    }
    fresh = Fresh()
    # What old gradients look like in both runs tells of nothing else: without them the other fault is seen.
    fresh.both = any(each.kind == "leftover" for each in view.reference.timeline)
    return [Suspicion("EQ302", [(fresh,)], evidence, finding.matched, 31, shared=fresh.both)]


def _kept(view: View) -> list[Suspicion]:
    """EQ302 if all that differs is how much of earlier gradients a loop's own sums still hold."""
    findings = [f for f in view.judgement.findings if f.kind in {"gradients", "applied"}]
    if view.chosen or not findings:
        return []
    evidence = kept_sums(view.experiment)
    if evidence is None:
        return []
    for finding in findings[:STEPS]:
        step = view.candidate.steps[finding.step]
        earlier = [s for s in view.candidate.steps[: step.index] if s.optimizer == step.optimizer]
        if not earlier or weight_of_earlier(view.experiment, step, earlier[-1]) is None:
            return []
    return [
        Suspicion(
            "EQ302",
            [],
            evidence,
            findings[0].matched,
            rank=13,
            shared=True,
            proved=True,
            explains=EXPLAINED,
        )
    ]
