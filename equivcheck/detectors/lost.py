"""Micro-batches that a step never got, EQ305: by their weights of zero, and by sweeps over a cycle that are too short.

A loop may go over its cycle several times (sharpness-aware minimisation, adversarial training), and a sweep may leave
micro-batches out. What those would have given is taken from the same loop, with the micro-batches of every cycle in
another order: there the same places are left out, and others stand in them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from equivcheck.attribution import predict, solve
from equivcheck.detectors.addends import addend_parts
from equivcheck.detectors.cycle import zeroing as kinds_of_zeroing
from equivcheck.fit import Attribution
from equivcheck.hypotheses import Changes, at_step
from equivcheck.interventions import EvaluateOnce, Intervention, Restitute, Supplement, Zeroing
from equivcheck.recording import Place, Recording
from equivcheck.view import Part, Suspicion, View, some_differing

Gradient = dict[str, torch.Tensor]
# What ends a sweep whose gradients are not added to the next one's.
_ENDS = frozenset({"step", "skipped", "zero_grad", "cleared", "parameters_changed"})


def suspect(view: View) -> list[Suspicion]:
    """Return EQ305 if micro-batches have no weight, or no backward in one of the sweeps over their cycle."""
    return _lost(view) or _lost_of_some(view) or _short_sweeps(view) or _lost_terms(view)


def _lost_of_some(view: View) -> list[Suspicion]:
    """EQ305 of the parameters that differ, where others do not: each may be summed by code of its own."""
    names = some_differing(view)
    found = _lost(Part(view, names)) if names else []
    for each in found:
        each.evidence["parameters"] = sorted(names)[:5]
    return found


def _lost(view: View) -> list[Suspicion]:
    """EQ305: the gradient is right but for micro-batches of weight zero, which are added back from their pieces."""
    cleared = view.inside(*kinds_of_zeroing(view), "step")
    if cleared or not view.divergent:
        return []
    missing: Changes = {}
    after: dict[int, Gradient] = {}
    # With the true weights, where those that are not lost have others: that fault is then left to be found.
    truly: Changes = {}
    restored: dict[int, list[int]] = {}
    evidence: dict[str, object] = {}
    step, only_last = 0, True
    once = _evaluated_once(view)
    losses: dict[int, float] = {}
    attributions = view.experiment.attributions((once,)) if once else view.divergent
    for each in attributions:
        right = view.right(each)
        if right is None:
            return []
        lost, meant = _left_out(view, each, right)
        if not lost and once:
            continue
        if not lost or meant is None:
            return []
        only_last &= lost == list(range(len(right) - 1))
        total = torch.zeros_like(each.reference)
        for k in lost:
            total += meant[k] * each.pieces[k]
        at_step(view, each, total, missing)
        if meant is not right:
            true = predict(each.pieces[lost], [right[k] for k in lost])
            at_step(view, each, true, truly)
            restored[view.cycle_of(each.matched)] = lost
        parts = torch.split(total, [length for _, length in each.names])
        names = (name for name, _ in each.names)
        backwards = view.candidate.steps[each.step].backwards
        after[backwards] = dict(zip(names, parts, strict=True))
        if once:
            alone = _losses_alone(view, once, each.matched)
            losses[backwards] = sum(meant[k] * alone.get(k, 0.0) for k in lost)
        if not evidence:
            evidence = {"lost_micro_steps": _told(each, lost), "weights": each.w.values}
            step = each.step
    if not evidence:
        return []
    variants: list[tuple[Intervention, ...]] = [(Restitute(missing),), (Supplement(after),)]
    if restored:
        variants.append((Restitute(truly, restored),))
    if once:
        variants = [(once, Supplement(after, losses))]
    code = "EQ301" if only_last and _sums_zeroed(view) else "EQ305"
    if code == "EQ301":
        evidence["because"] = "the sums that the loop keeps are set to zero within the cycle"
        evidence["fix"] = "set them to zero once, after the optimizer step"
    found = Suspicion(code, variants, evidence, step, 27)
    found.is_seen = True
    return [found]


def _left_out(
    view: View, attribution: Attribution, right: list[float]
) -> tuple[list[int], list[float] | None]:
    """Return the micro-batches of weight zero, and the weights that all would have; None where those are not known.

    Fewer coordinates than micro-batches leave weights open: then all but the last, or the first, are tried.
    """
    largest = max(abs(x) for x in (*right, *attribution.w.solution))
    lost = [k for k, w in enumerate(attribution.w.solution) if abs(w) <= 1e-9 * largest]
    if not lost and not attribution.w.unique:
        indices = list(range(len(right)))
        for others in (indices[:-1], indices[1:]):
            if meant := _meant(view, attribution, right, others):
                return others, meant
    return lost, _meant(view, attribution, right, lost)


def _meant(
    view: View, attribution: Attribution, right: list[float], lost: list[int]
) -> list[float] | None:
    """Return the weights that all micro-batches would have if none were lost: the true ones, or those of another fault.

    What is put back with a wrong weight leaves that fault alone, to be found.
    """
    k = len(right)
    for weights in (
        right,
        [1.0 / k] * k,
        [1.0] * k,
        [x * k for x in right],
        [x / k for x in right],
    ):
        if view.fits(attribution, [0.0 if i in lost else w for i, w in enumerate(weights)]):
            return weights
    return None


def _sums_zeroed(view: View) -> bool:
    """Return whether the loop sets sums of its own to zero within a cycle: those that it hands over at the step."""
    if view.experiment.crew is not None or not all(s.handed_over for s in view.candidate.steps):
        return False
    zeroing, begun = Zeroing(), Zeroing()
    view.experiment.candidate((*view.chosen, zeroing))
    if not zeroing.inside:
        return False
    # Sums may be made after the first backward of a cycle, in the full batch too.
    view.experiment.altered_reference((begun,))
    return not begun.late


def _evaluated_once(view: View) -> EvaluateOnce | None:
    """Return what makes closures be evaluated once, if they are more often.

    At the other parameters of a later evaluation, what is missing is not known.
    """
    if view.chosen or not any(event.kind == "repeat" for event in view.candidate.timeline):
        return None
    once: EvaluateOnce = view.experiment.remembered.setdefault("once", EvaluateOnce())
    return once


def _losses_alone(view: View, once: EvaluateOnce, matched: int) -> dict[int, float]:
    """Return the loss of every micro-batch of a cycle alone."""
    recording = view.experiment.pieces_recording((once,))
    cycle, found = view.cycle_of(matched), dict[int, float]()
    for place, backward in zip(recording.places(view.cycles), recording.backwards, strict=False):
        if place.cycle == cycle:
            found[place.micro_step] = found.get(place.micro_step, 0.0) + backward.loss
    return found


def _told(attribution: Attribution, lost: Sequence[int]) -> list[int | str]:
    """Return where pieces stand: micro-steps, with several ranks each with its rank."""
    if attribution.ranks == 1:
        return list(lost)
    places = (divmod(each, attribution.micro_steps) for each in lost)
    return [f"{micro_step} of rank {rank}" for rank, micro_step in places]


def _short_sweeps(view: View) -> list[Suspicion]:
    """EQ305: a sweep has no backward for some micro-batches, and with theirs it makes the full batch's gradient."""
    experiment = view.experiment
    if not view.divergent or view.chosen or experiment.crew is not None:
        return []
    if "dataset" in experiment.wants or not experiment.other_steps:
        return []
    mine = _sweeps(experiment.contributed(), view.places)
    if all(len(each.by_place) == each.micro_steps for sweeps in mine.values() for each in sweeps):
        return []
    whole = experiment.contributed_whole()
    wanted = _sweeps(whole, whole.places(view.cycles))
    after: dict[int, Gradient] = {}
    lost: list[int] = []
    step = 0
    for cycle, sweeps in mine.items():
        if len(sweeps) != len(wanted.get(cycle, ())):
            return []
        for index, sweep in enumerate(sweeps):
            absent = [k for k in range(sweep.micro_steps) if k not in sweep.by_place]
            if not absent:
                continue
            lacking = [_in_another_place(view, sweep, k, cycle, index) for k in absent]
            extra = _completed(view, wanted[cycle][index].total(), sweep.total(), lacking)
            if extra is None:
                break  # Another fault; or a sweep after a short one, which starts from elsewhere.
            after[sweep.end] = extra
            if not lost:
                lost, step = absent, cycle
    if not after:
        return []
    evidence: dict[str, object] = {
        "lost_micro_steps": lost,
        "sweeps_over_the_cycle": max(len(each) for each in mine.values()),
        "short_sweeps": len(after),
    }
    return [Suspicion("EQ305", [(Supplement(after),)], evidence, step, 18, is_seen=True)]


def _lost_terms(view: View) -> list[Suspicion]:
    """EQ305: a term of the loss has its backward in some micro-batches only; with the others it is the full batch's."""
    parts = addend_parts(view) if view.divergent and not view.chosen else None
    if parts is None:
        return []
    missing: Changes = {}
    evidence: dict[str, object] = {}
    step = 0
    for each in view.divergent:
        cycle = view.cycle_of(each.matched)
        total = torch.zeros_like(each.reference)
        for component in parts.components:
            alone = parts.pieces(each, cycle, component, accumulated=False)
            target = parts.target(each, cycle, component)
            if alone is None or target is None:
                return []
            absent = parts.absent(each, cycle, component)
            right = solve(alone, target).solution
            lacking = predict(alone[absent], [right[k] for k in absent]) if absent else 0.0
            found = parts.accumulated_total(each, cycle, component) + lacking
            size = max(float(target.norm()), float(alone.norm()))
            if float((found - target).norm()) > view.tolerance(each) * size:
                return []
            total += lacking
            if absent and not evidence:
                evidence = {"lost_micro_steps": absent, "of": f"backward {component[0]}"}
                step = each.step
        at_step(view, each, total, missing)
    return [Suspicion("EQ305", [(Restitute(missing),)], evidence, step, 28)] if evidence else []


def _in_another_place(view: View, short: _Sweep, k: int, cycle: int, index: int) -> Gradient:
    """Return what the micro-batch of place k gives where another order puts it in a place that is not left out."""
    place = min(short.by_place)
    recording = view.experiment.turned((k - place) % short.micro_steps)
    sweeps = _sweeps(recording, recording.places(view.cycles)).get(cycle, [])
    return sweeps[index].by_place.get(place, {}) if index < len(sweeps) else {}


class _Sweep:
    """Backwards of one cycle whose gradients belong together.

    Attributes:
        by_place: What the backwards of each micro-step added.
        end: Backwards that had run when it ended.
        micro_steps: Of the cycle.
    """

    def __init__(self, micro_steps: int) -> None:
        self.by_place: dict[int, Gradient] = {}
        self.end = 0
        self.micro_steps = micro_steps

    def total(self) -> Gradient:
        found: Gradient = {}
        for each in self.by_place.values():
            _add(found, each)
        return found


def _add(total: Gradient, more: Gradient) -> None:
    for name, tensor in more.items():
        total[name] = total[name] + tensor if name in total else tensor


def _sweeps(recording: Recording, places: list[Place]) -> dict[int, list[_Sweep]]:
    """Return the sweeps of every cycle, in order."""
    added: dict[int, Gradient] = {}
    for step in recording.steps:
        begin = step.backwards - len(step.contributions)
        added.update(enumerate(step.contributions, begin))
    ends = {event.backwards for event in recording.timeline if event.kind in _ENDS}
    found: dict[int, list[_Sweep]] = {}
    for i, place in enumerate(places):
        sweeps = found.setdefault(place.cycle, [])
        if not sweeps or i in ends:
            sweeps.append(_Sweep(place.micro_steps))
        here = sweeps[-1].by_place.setdefault(place.micro_step, {})
        _add(here, added.get(i, {}))
        sweeps[-1].end = i + 1
    return found


def _completed(
    view: View, wanted: Gradient, mine: Gradient, lacking: Sequence[Gradient]
) -> Gradient | None:
    """Return what a sweep lacks to be the full batch's but for one factor, to within noise; None if nothing does.

    As much of each micro-batch as goes with those that the sweep has: a sweep of which only the direction counts may
    have any size, and a wrong size is a fault of its own.
    """
    names = [name for name in wanted if wanted[name].numel()]
    if not names:
        return None
    rows = torch.stack([_joined(each, wanted, names) for each in (mine, *lacking)])
    target = _joined(wanted, wanted, names)
    noise = view.experiment.noise()
    limit = max(noise.floor(), noise.passed_on()) * float(target.norm())
    fit = solve(rows, target)
    if float((predict(rows, fit.solution) - target).norm()) > limit or not fit.solution[0] > 0:
        return None
    # As they are, where that makes it: of few coordinates any weights would.
    shares = [weight / fit.solution[0] for weight in fit.solution[1:]]
    if float((rows.sum(0) - target).norm()) <= limit:
        shares = [1.0] * len(lacking)
    extra: Gradient = {}
    for share, each in zip(shares, lacking, strict=True):
        _add(extra, {name: share * tensor for name, tensor in each.items()})
    return extra


def _joined(gradient: Gradient, like: Gradient, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([gradient.get(name, torch.zeros_like(like[name])) for name in names])
