"""State that advances with every micro-batch: EQ309, EQ312; and gradients that are absent in one run, EQ508."""

from __future__ import annotations

import torch

from equivcheck.attribution import predict
from equivcheck.detectors.coupling import norm_buffers
from equivcheck.errors import EquivcheckError
from equivcheck.fit import BEYOND_ROUNDING
from equivcheck.hypotheses import Changes, at_step
from equivcheck.interventions import (
    Before,
    Begin,
    Copies,
    Intervention,
    Restitute,
    Rewind,
    StillBuffers,
    ZerosToNone,
)
from equivcheck.view import Suspicion, View


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions for parameters, optimizer state, buffers and shadow weights that moved inside a cycle."""
    found = []
    judgement = view.judgement
    norms = norm_buffers(view)
    buffers = [f for f in judgement.findings if f.kind == "buffers" and set(f.names) - norms]
    if buffers:
        names = [name for name in buffers[0].names if name not in norms]
        evidence = {
            "buffers": names[:5],
            "relative": buffers[0].relative,
            "because": f"{names[0]} advances with every forward, so K times per optimizer step",
            "fix": "advance it once per optimizer step, or accept the difference: --expect EQ309",
        }
        found.append(Suspicion("EQ309", [(Rewind("buffers"),)], evidence, buffers[0].matched, 23))
        if not judgement.first("gradients", "applied"):
            # Statistics of the data do not come right by rewinding: a micro-batch has others.
            still = [(StillBuffers(),)]
            found.append(Suspicion("EQ203", still, evidence, buffers[0].matched, 37))
    if judgement.first("gradients", "applied") and _advances(view) - norms:
        evidence = {
            "buffers": sorted(_advances(view) - norms)[:5],
            "because": "every micro-batch moves them on, and the next one is computed with what it left",
            "fix": "move them on once per optimizer step, or accept the difference: --expect EQ309",
        }
        # Held still between steps too: what they come to be is another question than what they do.
        held = (Rewind("buffers"), StillBuffers())
        step = next(f for f in judgement.findings if f.kind in {"gradients", "applied"}).matched
        found.append(Suspicion("EQ309", [held], evidence, step, 38))
    shadows = judgement.first("shadows")
    if shadows is not None:
        evidence = {"shadow_weights": list(shadows.names[:5]), "relative": shadows.relative}
        # What was copied after one step is seen before the next.
        copies = [(Rewind("shadows"),), (Rewind("shadows", "counts"),)]
        copied = Suspicion("EQ309", copies, evidence, max(shadows.matched - 1, 0), 23)
        # Copies alone differ, of weights that agree: by a count of the loop's own, if not by the times they were made.
        others = {f.kind for f in judgement.findings if not set(f.names) <= set(shadows.names)}
        copied.is_seen = not others
        found.append(copied)
    found += _copies_by_count(view)
    stepped = {event.backwards for event, _ in view.inside("step")}
    moved = [each for each in view.inside("parameters_changed") if each[0].backwards not in stepped]
    updates = judgement.first("parameters", "state")
    rates = judgement.first("learning_rates")
    if moved or (updates is not None and (rates is None or updates.matched != rates.matched)):
        step = moved[0][1].cycle if moved else (updates.matched if updates is not None else 0)
        names = list(updates.names[:5]) if updates is not None else []
        evidence = {"changed_inside_cycles": len(moved), "tensors": names}
        variants: list[tuple[Intervention, ...]] = [
            (Rewind("state"),),
            (Rewind("parameters"),),
            (Rewind("parameters", "state"),),
            (Before(),),
        ]
        found.append(Suspicion("EQ312", variants, evidence, step, 32))
    found += _unused(view)
    return found


def _copies_by_count(view: View) -> list[Suspicion]:
    """EQ309 by prediction: copies of the weights are moved after the same counts of micro-batches, whatever K is.

    The loop run at accumulation_steps 1 shows those counts. It may ask for them at the ends of cycles only.
    """
    experiment, kinds = view.experiment, view.judgement.kinds()
    micro, cycles = len(view.places), len(view.reference.steps)
    steered = any(kept.begins for kept in view.reference.kept)
    # Copies that the loop steers its parameters by make gradients differ too, one step later.
    if view.chosen or not ("shadows" in kinds or steered):
        return []
    if (
        experiment.crew is not None
        or not experiment.other_steps
        or "dataset" in experiment.wants
        or len(view.reference.backwards) != cycles
        or len(experiment.micro_batches(experiment.data)) != micro
    ):
        return []
    try:
        moved = experiment.copies_moved()
    except EquivcheckError:
        return []
    ends = [i + 1 for i, place in enumerate(view.places) if place.last]
    full, mine, alone = (moved[role].moved for role in ("full_batch", "candidate", "pieces"))
    if len(ends) != cycles or not all(0 < n <= cycles for n in full):
        return []
    right = [ends[n - 1] for n in full]
    if mine == right and kinds <= {"shadows"}:
        return _copies_by_rate(moved["full_batch"], moved["candidate"], moved["pieces"])
    # A move from a weight to itself is none: such are lacking before the first step, and where interventions prove it.
    exact = mine in (
        alone,
        [n for n in alone if n in ends],
        [n for n in alone if n >= ends[0]],
        [n for n in alone if n > ends[0]],
    )
    if mine == right or not set(mine) <= set(alone) or (kinds <= {"shadows"} and not exact):
        return []
    evidence = {
        "rule": "the copies are moved by a count of micro-batches",
        "moved_after": mine[:8],
        "full_batch_would": right[:8],
    }
    if kinds <= {"shadows"}:
        found = Suspicion("EQ309", [], evidence, 0, rank=22, proved=True)
        found.explains = frozenset({"shadows"})
        return [found]
    begin = Begin(view.reference)
    variants: list[tuple[Intervention, ...]] = [
        (begin,),
        (Rewind("parameters", "shadows"), begin),
        (Rewind("parameters", "shadows"), Before(), begin),
    ]
    return [Suspicion("EQ309", variants, evidence, 0, rank=22, is_seen=True)]


def _copies_by_rate(full: Copies, mine: Copies, alone: Copies) -> list[Suspicion]:
    """EQ309 by prediction: copies are moved at the right times, by a rate that a count of micro-batches sets.

    The loop run at accumulation_steps 1 shows the rate after each count.
    """
    by_count = dict(zip(alone.moved, alone.shares, strict=True))
    predicted = [by_count.get(count) for count in mine.moved]
    rates = [
        (right, used, told)
        for right, used, told in zip(full.shares, mine.shares, predicted, strict=True)
        if right is not None and used is not None and told is not None
    ]
    # After the last step of a run its weights are no longer there to measure by.
    if len(rates) < max(len(mine.shares) - 1, 2):
        return []
    # A few coordinates of float64 weights tell a share to about this much.
    is_told = all(abs(used - told) <= BEYOND_ROUNDING for _, used, told in rates)
    if not is_told or all(abs(used - right) <= BEYOND_ROUNDING for right, used, _ in rates):
        return []
    evidence = {
        "rule": "the rate of the average is set by a count of micro-batches",
        "because": "the count that sets the decay of the average advances with every micro-batch",
        "fix": "count optimizer steps for the decay of the average",
        "rates": [used for _, used, _ in rates[:8]],
        "full_batch_would": [right for right, _, _ in rates[:8]],
    }
    found = Suspicion("EQ309", [], evidence, 0, rank=22, proved=True)
    found.explains = frozenset({"shadows"})
    return [found]


def _advances(view: View) -> set[str]:
    """Return the buffers that differ from what they were at the start, at any step of the full batch."""
    reference = view.reference
    start = reference.initial.buffers if reference.initial is not None else {}
    return {
        name
        for kept in reference.kept
        for name, buffer in kept.buffers.items()
        if name not in start or not torch.equal(buffer, start[name])
    }


def _unused(view: View) -> list[Suspicion]:
    none = view.judgement.first("none")
    if none is None:
        return []
    evidence = {"parameters": list(none.names[:5])}
    names = {name for f in view.judgement.findings if f.kind == "none" for name in f.names}
    variants: list[tuple[Intervention, ...]] = [(ZerosToNone(names),)]
    missing: Changes = {}
    for each in view.attributions:
        right = view.right(each)
        absent = {
            name for name in names if view.candidate.steps[each.step].sample.get(name) is None
        }
        if right is not None and absent:
            at_step(view, each, predict(each.pieces, right), missing, absent)
    if missing:
        variants.append((Restitute(missing),))
    return [Suspicion("EQ508", variants, evidence, none.matched, 17)]
