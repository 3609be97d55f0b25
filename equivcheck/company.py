"""The weights of micro-batches in company: taken from the backwards of the accumulated run itself.

A micro-batch alone is the better piece, since nothing of the accumulated run is in it. Some loops do not allow it:
where one optimizer steps on what another has just done (adversarial training), or the weights are moved by a first
sweep over the cycle (sharpness-aware minimisation), or something is added to the gradients before the step, a
micro-batch alone is another problem. What its backward adds in the accumulated run is then the piece: it is computed at
the reference's own state. That the loop may have scaled it wrongly is what a fit of the *full batch* shows.

K micro-batches, n sampled coordinates.
"""

from __future__ import annotations

import math

import torch

from equivcheck.attribution import solve
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment, Interventions
from equivcheck.fit import BEYOND_ROUNDING, Attribution, flat
from equivcheck.interventions import ordinal_of
from equivcheck.recording import Place, Recording, Step


def attributions_in_company(
    experiment: Experiment, interventions: Interventions
) -> list[Attribution]:
    """Return the weights of every matched step whose backwards added something for every micro-batch."""
    reference = experiment.reference(interventions)
    recording = experiment.contributed(interventions)
    places = experiment.schedule(interventions)
    found = []
    for step in recording.steps:
        if step.matched is None or step.backwards > len(places):
            continue
        made = _attribution(
            experiment, interventions, recording, places, step, reference.steps[step.matched]
        )
        if made is not None:
            found.append(made)
    return found


def _attribution(
    experiment: Experiment,
    interventions: Interventions,
    recording: Recording,
    places: list[Place],
    step: Step,
    target: Step,
) -> Attribution | None:
    names = [(name, len(s)) for name, s in target.sample.items() if s is not None]
    begin = _begin(recording, places, step)
    indices = range(begin, step.backwards)
    cycle = places[step.backwards - 1].cycle
    counted = [i for i in indices if places[i].cycle == cycle]
    k = places[step.backwards - 1].micro_steps
    rows = [torch.zeros(sum(length for _, length in names), dtype=torch.float64) for _ in range(k)]
    if not counted or {places[i].micro_step for i in counted} != set(range(k)):
        return None
    first = step.backwards - len(step.contributions)
    for i in counted:
        added = step.contributions[i - first]
        rows[places[i].micro_step] += torch.cat(
            [added.get(name, torch.zeros(length, dtype=torch.float64)) for name, length in names]
        )
    pieces = torch.stack(rows) * _scale(experiment, interventions, recording, places, counted)
    reference, candidate = flat(target, names), flat(step, names)
    w = solve(pieces, candidate)
    if w.residual is not None and w.residual > BEYOND_ROUNDING:
        # Something was added to the gradients, to the full batch's too.
        total = torch.stack(rows).sum(0)
        reference, candidate = reference - (candidate - total), total
        w = solve(pieces, candidate)
    ordinals = frozenset(ordinal_of(places, i) for i in counted)
    every = frozenset(ordinal_of(places, i) for i, each in enumerate(places) if each.cycle == cycle)
    return Attribution(
        step.index,
        target.index,
        pieces,
        reference,
        candidate,
        solve(pieces, reference),
        w,
        names,
        ordinals=None if ordinals == every else ordinals,
    )


def _begin(recording: Recording, places: list[Place], step: Step) -> int:
    """Return the first backward that a step's gradients hold: after a sweep whose gradients were dropped."""
    begin = step.backwards - len(step.contributions)
    for event in recording.timeline:
        if (
            event.kind in {"zero_grad", "cleared"}
            and begin < event.backwards < step.backwards
            and places[event.backwards - 1].last
        ):
            begin = event.backwards
    return begin


def _scale(
    experiment: Experiment,
    interventions: Interventions,
    recording: Recording,
    places: list[Place],
    counted: list[int],
) -> float:
    """Return the power of K by which micro-batches alone have larger losses: what the loop divides them by."""
    k = places[counted[0]].micro_steps
    cycle = places[counted[0]].cycle
    wanted = {(places[i].micro_step, ordinal_of(places, i)) for i in counted}
    mine = sum(abs(recording.backwards[i].loss) for i in counted)
    try:
        alone = experiment.pieces_recording(interventions)
    except EquivcheckError:
        return float(k)
    theirs = 0.0
    stands = alone.places(experiment.cycles(interventions))
    for i, (place, backward) in enumerate(zip(stands, alone.backwards, strict=False)):
        if place.cycle == cycle and (place.micro_step, ordinal_of(stands, i)) in wanted:
            theirs += abs(backward.loss)
    if k < 2 or not mine or not theirs or not math.isfinite(theirs / mine):
        return float(k)
    return float(k ** round(math.log(theirs / mine) / math.log(k)))
