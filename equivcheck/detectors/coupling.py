"""Samples that interact: EQ201, EQ202, EQ203. The full batch is then no sum of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from equivcheck.attribution import predict
from equivcheck.detectors.addends import coupled_addends, spanned
from equivcheck.detectors.carried import Carried
from equivcheck.detectors.clipped import clipped_nowhere
from equivcheck.errors import EquivcheckError
from equivcheck.fit import BEYOND_ROUNDING, Attribution
from equivcheck.freeze import Fingerprint, Freeze, Statistics
from equivcheck.interventions import Shrink
from equivcheck.noise import SAFETY
from equivcheck.recording import Backward
from equivcheck.view import Suspicion, View, within

# A factor leaves no more of a gradient than float32 rounds.
EXACT = 1e-6
_BY_ITSELF: Final = {
    "because": "parameters are moved by what one micro_batch gives, and its gradient is taken anew where they are then",
    "fix": "move them by the gradient of the whole cycle, or accept the difference: --expect EQ202",
}
NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def norm_buffers(view: View) -> set[str]:
    """Return the buffers of this run that hold running statistics of a normalization."""
    names = {name for step in view.candidate.steps for name in step.buffers}
    return {name for name in names if name.rpartition(".")[2] in NORM_BUFFERS}


def suspect(view: View) -> list[Suspicion]:
    """Return suspicions for couplings between rows, in a module's output or in the loss."""
    if any(isinstance(each, Freeze) for each in view.chosen):
        return []
    outside = [each for each in view.attributions if not view.spans(each, reference=True)]
    if outside and spanned(view):
        outside = []
    norms = norm_buffers(view)
    statistics = [
        f for f in view.judgement.findings if f.kind == "buffers" and set(f.names) <= norms
    ]
    found: list[Suspicion] = []
    freeze = Freeze(view.experiment.cycles())
    predicted = bool(statistics and outside) and _as_predicted(view)
    if outside:
        found += _coupled(view, freeze, outside[0].step)
        if predicted and found[0].explains:
            found[0].explains |= {"buffers"}
    if statistics and not predicted:
        evidence = {"buffers": list(statistics[0].names[:5]), "relative": statistics[0].relative}
        found.append(Suspicion("EQ203", [(freeze,)], evidence, statistics[0].matched, 36))
    return found


def _as_predicted(view: View) -> bool:
    """Return whether running statistics are what K updates with the micro-batches' own statistics give."""
    watch = Statistics()
    view.experiment.candidate((watch,))
    return watch.as_predicted


def _coupled(view: View, freeze: Freeze, step: int) -> list[Suspicion]:
    place, first, moved = _first_coupled(view)
    by_itself = place is None and moved and _rightly_accumulated(view)
    if place is None and not by_itself and (moved or _added_to(view) or _clipped(view)):
        return []
    carried, explained = _carried(view) if place is None else (False, False)
    if explained:
        return []
    evidence: dict[str, object] = {"residual": max(a.v.residual or 0.0 for a in view.attributions)}
    if place is not None:
        evidence |= {"module": place, "relative": first}
    code = "EQ201" if place is not None else "EQ202"
    found = [Suspicion(code, [(freeze,)] if place is not None else [], evidence, step, 34)]
    # Where there is nothing to freeze: rows change with their company, and the weights are right.
    if place is None or view.experiment.together or not _freezable(view, freeze):
        found[0].proved = _rightly_accumulated(view) or coupled_addends(view, _shares)
        if carried:
            # Not rows alone: what micro-batches leave behind has a part in it.
            found[0].proved = False
        found[0].variants = []
        found[0].explains = frozenset({"gradients", "applied", "parameters", "state"})
        found[0].evidence |= _BY_ITSELF if by_itself else _told(place)
        if view.experiment.together:
            found[0].evidence["pieces"] = "what all ranks compute in one micro-step"
    return found


def _told(place: str | None) -> dict[str, str]:
    """Return what is told of rows that change with their company."""
    if place is None:
        return {
            "perturbation": "no module's rows change with their company, the loss of the full batch is no sum of theirs"
        }
    return {
        "because": f"{place} computes a row's output from other rows of the batch too",
        "fix": "compute it per row, or accept the difference: --expect EQ201",
        "perturbation": f"the same rows give other outputs of {place} in other company",
    }


def _added_to(view: View) -> bool:
    """Return whether the loop adds something of its own to gradients inside a cycle: no sum of pieces holds it."""
    return any(event.detail["rest"] > EXACT for event, _ in view.inside("edited"))


def _clipped(view: View) -> bool:
    """Return whether gradients too small to be clipped are sums over the micro-batches: then no rows interact."""
    if clipped_nowhere(view):
        return False
    small = View(view.experiment, (*view.chosen, Shrink()))
    return all(small.spans(each, reference=True) for each in small.attributions)


def _carried(view: View) -> tuple[bool, bool]:
    """Return whether micro-batches depend on those before them, and whether the loss then couples none of them."""
    try:
        found = Carried.of(view)
    except EquivcheckError:
        found = None
    return found is not None, found is not None and found.right is not None


def _rightly_accumulated(view: View) -> bool:
    """Return whether what micro-batches give alone is added up with right weights, in every step."""
    return all(_weighted_right(view, each) for each in view.attributions)


def _freezable(view: View, freeze: Freeze) -> bool:
    view.experiment.reference((freeze,))
    return freeze.used


def _weighted_right(view: View, attribution: Attribution) -> bool:
    """Return whether the accumulated gradient is in the span, with right weights.

    Where rows interact the true weights cannot be read from the gradient. They are those of a mean,
    in equal parts or by a count; or all 1, of a sum. A sum shows in the losses, or in the
    gradients' norms: they add up to the full batch's, but for the interaction, which changes one of
    the two by far less than a factor of K.
    """
    if not view.spans(attribution, reference=False) and not (
        view.experiment.together and within(attribution.w)
    ):
        return False
    k = attribution.pieces.shape[0]
    if _fits(view, attribution, [1.0] * k):
        return _adds_up(view, attribution)
    return any(_fits(view, attribution, weights) for weights in _shares(view, attribution))


def _fits(view: View, attribution: Attribution, weights: list[float]) -> bool:
    """Return whether weights predict the accumulated gradient: to within noise.

    What ranks compute together they compute by formulas of their own, whose rounding no control of one process has
    measured.
    """
    if view.fits(attribution, weights):
        return True
    if not view.experiment.together:
        return False
    rest = float((attribution.candidate - predict(attribution.pieces, weights)).norm())
    return rest <= BEYOND_ROUNDING * float(attribution.candidate.norm())


def _shares(view: View, attribution: Attribution) -> list[list[float]]:
    """Return the weights of a mean: equal parts, or in proportion to something that is counted."""
    k = attribution.pieces.shape[0]
    choices = [[1.0 / k] * k]
    for values in view.counts().values():
        counts = values[attribution.matched % len(values)]
        if view.experiment.together:
            counts = [sum(counts[step::k]) for step in range(k)]
        if len(counts) == k and sum(counts) > 0:
            choices.append([x / sum(counts) for x in counts])
    return choices


def _adds_up(view: View, attribution: Attribution) -> bool:
    """Return whether losses or gradients of the micro-batches add up to about the full batch's, not to K times it."""
    target = view.reference.steps[attribution.matched]
    full = view.reference.backwards[target.first_backward : target.backwards]
    alone = view.experiment.pieces_recording(view.chosen)
    cycle = view.cycle_of(attribution.matched)
    own = [
        (place, backward)
        for place, backward in zip(alone.places(view.cycles), alone.backwards, strict=False)
        if place.cycle == cycle
    ]
    stated = _stated(full, [backward for _, backward in own])
    if stated is not None:
        return all(abs(each - 1.0) <= EXACT for each in stated)
    # Halfway, on the scale of factors, between right and wrong by K.
    limit = math.log(max(attribution.pieces.shape[0], 2)) / 2
    sizes = float(attribution.candidate.norm()), float(attribution.reference.norm())
    if all(sizes) and abs(math.log(sizes[0] / sizes[1])) < limit:
        return True
    whole = sum(each.loss for each in full)
    losses: dict[int, float] = {}
    for place, backward in own:
        losses[place.micro_step] = losses.get(place.micro_step, 0.0) + backward.loss
    total = sum(losses.values())
    return bool(whole) and total / whole > 0 and abs(math.log(total / whole)) < limit


def _stated(full: Sequence[Backward], alone: Sequence[Backward]) -> list[float] | None:
    """Return the weights that the loss's own reduction gives micro-batches; None where it is not seen.

    A mean over terms, or a sum that is divided, multiplies each term with one number: in the full batch, and in every
    micro-batch alone. The terms have to be those of the samples, of which each micro-batch has its part.
    """
    made = [each.reduction for each in (*full, *alone)]
    if len(full) != 1 or any(each is None or not each.scale for each in made):
        return None
    whole, *parts = [each for each in made if each is not None]
    terms = sum(each.terms for each in parts)
    if any(each.kind != whole.kind for each in parts) or abs(terms - whole.terms) > EXACT * terms:
        return None
    return [whole.scale / each.scale for each in parts]


def _first_coupled(view: View) -> tuple[str | None, float, bool]:
    """Return the first module whose output for a row depends on the other rows, how much, and if parameters moved."""
    experiment = view.experiment
    if "fingerprint" not in experiment.remembered:
        print_ = Fingerprint(experiment.cycles())
        experiment.reference((print_,))
        try:
            experiment.pieces_recording((print_,))
        except EquivcheckError:
            # The loop refuses micro-batches alone: within the accumulated run they are as far from each other.
            experiment.candidate((print_,))
        limit = SAFETY * experiment.noise().floor()
        experiment.remembered["fingerprint"] = (
            *print_.first_difference(limit),
            print_.moved(limit),
        )
    return experiment.remembered["fingerprint"]  # type: ignore[no-any-return]
