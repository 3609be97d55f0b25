"""Ranks that share a batch: EQ501, EQ502, EQ504, EQ505, EQ506, EQ508. R ranks, K micro-batches each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from equivcheck.attribution import solve
from equivcheck.detectors.weights import all_alike, mean_of_ranks
from equivcheck.differences import Sums
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Interventions
from equivcheck.hypotheses import Predict, hypotheses, scaled, unproved
from equivcheck.interventions import (
    Broadcast,
    FindUnused,
    Maximum,
    NormOfWhole,
    SumOverRanks,
    Synchronise,
    SynchroniseOnce,
)
from equivcheck.noise import SAFETY
from equivcheck.recording import Recording, Step
from equivcheck.settled import sends_after_steps
from equivcheck.topology import another, equal_parts_of, factor_of, undecided
from equivcheck.traffic import reductions
from equivcheck.verdict import Finding, overall
from equivcheck.view import Part, Suspicion, View, some_differing

Gradients = Mapping[str, "torch.Tensor | None"]
_NUMBERS = ("spread_between_ranks", "weights_of_each_rank")


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions where several ranks ran; with one there is nothing that could be wrong between them."""
    if view.experiment.case.world_size == 1:
        return []
    return [
        *_mean_of_ranks(view),
        *_rank_scale(view),
        *_unused(view),
        *_unsynchronised(view),
        *_parted(view),
        *_clipped(view),
    ]


def _unused(view: View) -> list[Suspicion]:
    """EQ508: the ranks step with different gradients, and it is mended by a part of those who have none.

    DDP is told to look for unused parameters; where a loop reduces by hand, and a gradient is there on some ranks
    only, zeros stand for it on the others.
    """
    found = []
    for each in _apart_at_the_step(view):
        variants: list[Interventions] = [(FindUnused(),)]
        partly = _on_some_ranks(steps_of(view.candidate, each.step))
        if partly:
            variants.append((Synchronise(),))
        evidence = {key: value for key, value in each.evidence.items() if key in _NUMBERS}
        evidence["on_some_ranks_only"] = partly[:5]
        found.append(Suspicion("EQ508", variants, evidence, each.step, 16))
    return found


def _on_some_ranks(steps: Sequence[Step]) -> list[str]:
    """Return the parameters that have a gradient on some ranks and none on others."""
    names = dict.fromkeys(name for each in steps for name in each.sample)
    return [
        name
        for name in names
        if len({each.sample[name] is None for each in steps if name in each.sample}) > 1
    ]


# ---- norms -------------------------------------------------------------------------------------

# Norms that agree to this are the same norm: rounding is far below it, and parts of a gradient far above.
_SAME = 1e-6
_BEFORE_THE_REDUCTION = {
    "because": "the clip looks at the gradients of one rank, before they are reduced",
    "fix": "clip after the gradients are reduced, on every rank",
}


def _clipped(view: View) -> list[Suspicion]:
    """EQ506: a clip took the norm of what one rank holds."""
    finding = view.judgement.first("applied", "gradients")
    if finding is None:
        return []
    events = [
        [event for event in each.timeline if event.kind == "clip" and "norm" in event.detail]
        for each in view.candidate.ranks
    ]
    if not all(events):
        # What ranks do without a call, or some of them only, is looked for elsewhere.
        return _clipped_by_value(view, finding)
    norms = {view.cycle_of(step.index): step.norm for step in view.reference.steps}
    used = [each[0].detail["norm"] for each in events]
    wanted = next((e for e in view.reference.timeline if e.kind == "clip"), None)
    if wanted is None or all(abs(x / wanted.detail["norm"] - 1.0) < _SAME for x in used):
        return _other_maximum(view, finding) if wanted is not None else []
    evidence = {"norm_of_each_rank": used, "norm_of_the_whole": wanted.detail["norm"]}
    steps, limit = steps_of(view.candidate, finding.step), SAFETY * view.experiment.noise().floor()
    if gradient_spread(steps) > limit and _reduced_after_a_clip(steps, limit):
        evidence |= _BEFORE_THE_REDUCTION
    # Where the reduction comes after the clip, both are put right by one that comes before it.
    variants: list[Interventions] = [(NormOfWhole(norms),), (Synchronise(),)]
    return [Suspicion("EQ506", variants, evidence, max(finding.matched, 0), 21)]


def _other_maximum(view: View, finding: Finding) -> list[Suspicion]:
    """EQ506 of the right norm: what it is clipped to is multiplied with, or divided by, the number of ranks."""
    size = view.experiment.case.world_size
    wanted = _maxima(view.reference, view)
    used = [_maxima(each, view) for each in view.candidate.ranks]
    if not wanted or any(each.keys() != wanted.keys() for each in used):
        return []
    ratios = {each[cycle] / most for each in used for cycle, most in wanted.items() if most}
    factor = next((x for x in (float(size), 1.0 / size) if all(y == x for y in ratios)), None)
    if factor is None or not ratios or (size == view.steps and not _keeps_its_maximum(view)):
        return []
    cycle = min(wanted)
    evidence: dict[str, object] = {
        "maximum": used[0][cycle],
        "maximum_of_the_full_batch": wanted[cycle],
        "world_size": size,
        "because": "the largest norm that the clip leaves follows the number of ranks, and the norm of the whole "
        "gradient does not",
        "fix": "clip to the same norm on any number of ranks",
    }
    return [Suspicion("EQ506", [(Maximum(wanted),)], evidence, max(finding.matched, 0), 21)]


def _maxima(recording: Recording, view: View) -> dict[int, float]:
    """Return, per cycle, the largest norm that the last clip before the step leaves."""
    places, found = recording.places(view.cycles), {}
    for event in recording.timeline:
        if event.kind == "clip" and "norm" in event.detail and 0 < event.backwards <= len(places):
            found[places[event.backwards - 1].cycle] = float(event.detail["max_norm"])
    return found


def _keeps_its_maximum(view: View) -> bool:
    """Return whether another K is clipped to the same: K, which is R here, has no part in it."""
    other = another(view)
    if other is None:
        return False
    try:
        recording = view.experiment.at(other)
    except EquivcheckError:
        return False
    return {*_maxima(recording, view).values()} == {*_maxima(view.candidate, view).values()}


def _clipped_by_value(view: View, finding: Finding) -> list[Suspicion]:
    """EQ506 of a clip of each element: it is put right by a reduction that comes before it."""
    ranks = view.candidate.ranks
    if not all(any(e.kind == "clip" and "norm" not in e.detail for e in r.timeline) for r in ranks):
        return []
    left = [
        step.left for step in steps_of(view.experiment.left_on_ranks(view.chosen), finding.step)
    ]
    apart = spread([each for each in left if each])
    if apart <= SAFETY * view.experiment.noise().floor():
        return []
    evidence: dict[str, object] = {
        "spread_between_ranks": apart,
        **_BEFORE_THE_REDUCTION,
    }
    return [Suspicion("EQ506", [(Synchronise(),)], evidence, max(finding.matched, 0), 21)]


# ---- weights -----------------------------------------------------------------------------------


def _mean_of_ranks(view: View) -> list[Suspicion]:
    """EQ501: within a rank the weights are right, between ranks every one counts the same."""
    if not view.divergent or view.experiment.case.shares == 1:
        return []
    return hypotheses(view, "EQ501", [mean_of_ranks], rank=13)


def _rank_scale(view: View) -> list[Suspicion]:
    """EQ504: a factor of the number of ranks, whatever K is; of all gradients, or of some parameters only."""
    found = _scale_of(view)
    names = some_differing(view) if not found else frozenset()
    if names:
        found = _scale_of(Part(view, names))
        for each in found:
            each.evidence["parameters"] = sorted(names)[:5]
    return found


def _scale_of(view: View) -> list[Suspicion]:
    if undecided(view):
        return [unproved(view, "EQ504", rank=13)] if any(b for _, b in undecided(view)) else []
    factor = factor_of(view)
    size = view.experiment.case.world_size
    if factor is None:
        # Where K is R another K tells which of them it is.
        alike = equal_parts_of(view) if size == view.steps else None
        for power, told in ((1, "K"), (-1, "K, divided by R again")):
            if size != view.steps or alike == told:
                alike_times = _alike_times(float(size) ** power)
                found = hypotheses(view, "EQ504", [alike_times], rank=13, meant=all_alike)
                if found:
                    return found
        return []
    if not factor[1]:
        return []
    found = scaled(view, "EQ504", float(size) ** factor[1], rank=13)
    found[0].evidence["world_size"] = size
    return found


def _alike_times(factor: float) -> Predict:
    """All micro-batches count the same, as each rank's own mean of means has it, but for what is done between ranks."""
    return lambda a, v: [factor * x for x in all_alike(a, v)]


# ---- what differs between ranks ----------------------------------------------------------------


def steps_of(recording: Recording, index: int) -> list[Step]:
    """Return every rank's own view of an optimizer step."""
    return [each.steps[index] for each in recording.ranks if index < len(each.steps)]


def gradient_spread(steps: Sequence[Step]) -> float:
    """Return the largest relative difference of a gradient between ranks that hold it whole."""
    worst = 0.0
    for name, sample in steps[0].sample.items():
        present = [each.sample.get(name) for each in steps if name in each.sample]
        if any(name in each.parts for each in steps) or len(present) < len(steps):
            continue
        if len({each is None for each in present}) > 1:
            return 1.0
        if sample is None:
            continue
        size = max(float(each.norm()) for each in present if each is not None)
        apart = max(float((each - sample).norm()) for each in present if each is not None)
        if size:
            worst = max(worst, apart / size)
    return worst


def spread(ranks: Sequence[Gradients]) -> float:
    """Return the largest relative difference of a gradient from rank 0's; 1 where only some have it."""
    worst = 0.0
    if len(ranks) < 2:
        return worst
    for name, first in ranks[0].items():
        others = [each.get(name) for each in ranks[1:]]
        if any((each is None) != (first is None) for each in others):
            return 1.0
        if first is None:
            continue
        size = max(
            float(first.norm()), *(float(each.norm()) for each in others if each is not None)
        )
        away = max(float((each - first).norm()) for each in others if each is not None)
        worst = max(worst, away / size if size else 0.0)
    return worst


def _unsynchronised(view: View) -> list[Suspicion]:
    """EQ502: the ranks step with different gradients, or with parts that nothing was reduced into."""
    return _apart_at_the_step(view) or _unsynchronised_parts(view)


def _apart_at_the_step(view: View) -> list[Suspicion]:
    """EQ502 where ranks hold gradients whole: they differ between the ranks."""
    limit = SAFETY * view.experiment.noise().floor()
    for index in range(len(view.candidate.steps)):
        steps = steps_of(view.candidate, index)
        spread = gradient_spread(steps) if len(steps) > 1 else 0.0
        if spread > limit and not _reduced_after_a_clip(steps, limit):
            evidence: dict[str, object] = {"spread_between_ranks": spread}
            apart, held = _apart_and_held(steps, limit)
            evidence |= (
                _some_parameters(view, apart, held)
                or _tails_only(view, limit)
                or _averaged_later(view)
            )
            weights = _weights_of_ranks(view, index)
            if weights:
                evidence["weights_of_each_rank"] = weights
            variants: list[Interventions] = [(Synchronise(),)]
            if view.experiment.case.shares == 1:
                variants.insert(0, (SumOverRanks(frozenset(apart)),))
            return [Suspicion("EQ502", variants, evidence, index, 18, is_seen=True)]
    return []


def _apart_and_held(steps: Sequence[Step], limit: float) -> tuple[list[str], list[str]]:
    """Return the parameters whose gradients differ between ranks, and all that every rank has."""
    held = [name for name in steps[0].sample if all(name in each.sample for each in steps)]
    apart = [
        name
        for name in held
        if gradient_spread([replace(s, sample={name: s.sample[name]}) for s in steps]) > limit
    ]
    return apart, held


def _some_parameters(view: View, apart: Sequence[str], held: Sequence[str]) -> dict[str, object]:
    """Tell which gradients differ between ranks, where others are the same on all; nothing where all differ."""
    if len(apart) == len(held):
        return {}
    where: dict[str, object] = {
        "not_reduced": apart[:5],
        "parameters": f"{len(apart)} of {len(held)}",
    }
    if view.experiment.case.shares == 1:
        return {
            **where,
            "because": "ranks that compute parts of one batch each hold what flows back through their own part",
            "fix": "all-reduce in the backward the gradient of what every rank's part takes as its input",
        }
    return {
        **where,
        "because": "the reduction leaves these parameters out, and the others are the same on all ranks",
        "fix": "reduce the gradients of all parameters that the optimizer steps",
    }


def _averaged_later(view: View) -> dict[str, object]:
    """Tell that no gradient is reduced, and parameters are after the step, which is another update."""
    ranks = view.candidate.ranks
    if not sends_after_steps(ranks, "reduce") or any(
        sent for rank in ranks for step in reductions(rank) for sent in step
    ):
        return {}
    return {
        "because": "every rank steps with its own gradient, and what is reduced after the step is not the step that "
        "the mean of the gradients gives",
        "fix": "reduce the gradients before optimizer.step(), not the parameters after it",
    }


def _tails_only(view: View, limit: float) -> dict[str, object]:
    """Tell that ranks differ after incomplete cycles only; nothing where a complete one differs, or there is none."""
    apart, full = [], 0
    for step in view.candidate.steps:
        complete = step.backwards - step.first_backward >= view.steps
        full += complete
        if gradient_spread(steps_of(view.candidate, step.index)) > limit:
            apart.append(complete)
    if any(apart) or not full:
        return {}
    return {
        "cycles": "incomplete ones only",
        "because": "the optimizer steps at the end of the loader too, but the last micro-batch of that "
        "incomplete cycle runs without a reduction",
        "fix": "leave no_sync() where the step is taken: (step + 1) % accumulation_steps == 0 or "
        "step + 1 == len(loader)",
    }


def _unsynchronised_parts(view: View) -> list[Suspicion]:
    """EQ502: after the last backward of a cycle nothing is reduced into the parts that ranks step.

    What shards miss stays in gradients that no optimizer sees.
    """
    finding = view.judgement.first("gradients", "none")
    if finding is None or finding.step < 0:
        return []
    steps = steps_of(view.candidate, finding.step)
    sent = [reductions(each)[finding.step] for each in view.candidate.ranks if each.steps]
    if not any(each.parts for each in steps) or not all(sent):
        return []
    counts = [[len(backward) for backward in each] for each in sent]
    if all(each[-1] and each[-1] == max(each) for each in counts):
        return []
    evidence: dict[str, object] = {"reductions_after_each_backward": counts}
    return [Suspicion("EQ502", [(SynchroniseOnce(),)], evidence, finding.step, 18)]


def _reduced_after_a_clip(steps: Sequence[Step], limit: float) -> bool:
    """Return whether gradients differ between ranks before a clip only: the step takes the same everywhere."""
    if not any(each.clipped for each in steps):
        return False
    taken = [overall(each.applied) for each in steps]
    size = taken[0].rr or 1.0
    return all(
        abs(each.rd - taken[0].rd) <= limit * size and abs(each.dd - taken[0].dd) <= limit * size
        for each in taken
    )


def _weights_of_ranks(view: View, index: int) -> list[list[float | None]]:
    found = next((each for each in view.attributions if each.step == index), None)
    if found is None:
        return []
    result = []
    for step in steps_of(view.candidate, index):
        parts = [
            torch.zeros(length, dtype=torch.float64) if (s := step.sample.get(name)) is None else s
            for name, length in found.names
        ]
        result.append(solve(found.pieces, torch.cat(parts)).values)
    return result


def _parted(view: View) -> list[Suspicion]:
    """EQ505: the ranks hold different parameters or buffers, although no gradient differs between them."""
    limit = SAFETY * view.experiment.noise().floor()
    for index in range(len(view.candidate.steps)):
        steps = steps_of(view.candidate, index)
        if len(steps) < 2 or gradient_spread(steps) > limit:
            continue
        kinds = ("parameters", "buffers")
        apart = {kind: _apart(steps, [getattr(each, kind) for each in steps]) for kind in kinds}
        if max(apart.values()) > limit:
            what = max(kinds, key=lambda kind: apart[kind])
            evidence: dict[str, object] = {"spread_between_ranks": apart[what], "of": what}
            variants = [(Broadcast(source),) for source in range(len(steps))]
            return [Suspicion("EQ505", variants, evidence, index, 19)]
    return []


def _apart(steps: Sequence[Step], sums: Sequence[Mapping[str, Sums]]) -> float:
    """Return how differently far the tensors of the ranks are from the reference's, relative to their size.

    A reference of zeros leaves nothing to relate to: what is apart from it then counts as wholly apart.
    """
    worst = 0.0
    for name in sums[0]:
        found = [each[name] for each in sums if name in each]
        if any(name in each.parts for each in steps) or len(found) < len(steps):
            continue
        sizes = [each.difference_norm for each in found]
        spread = max(sizes) - min(sizes)
        if spread:
            worst = max(worst, spread / (found[0].reference_norm or spread))
    return worst
