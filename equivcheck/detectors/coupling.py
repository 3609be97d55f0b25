"""Samples that interact: EQ201, EQ202, EQ203. The full batch is then no sum of its micro-batches."""

from __future__ import annotations

from equivcheck.freeze import Fingerprint, Freeze, Statistics
from equivcheck.view import Suspicion, View

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
    norms = norm_buffers(view)
    statistics = [f for f in view.judgement.findings if f.kind == "buffers" and set(f.names) <= norms]
    found: list[Suspicion] = []
    freeze = Freeze(view.experiment.cycles())
    if outside:
        found += _coupled(view, freeze, outside[0].step)
    if statistics and (not outside or not _as_predicted(view)):
        evidence = {"buffers": list(statistics[0].names[:5]), "relative": statistics[0].relative}
        found.append(Suspicion("EQ203", [(freeze,)], evidence, statistics[0].matched, 36))
    return found


def _as_predicted(view: View) -> bool:
    """Return whether running statistics are what K updates with the micro-batches' own statistics give."""
    watch = Statistics()
    view.experiment.candidate((watch,))
    return watch.as_predicted


def _coupled(view: View, freeze: Freeze, step: int) -> list[Suspicion]:
    place, first = _first_coupled(view)
    evidence: dict[str, object] = {"residual": max(a.v.residual or 0.0 for a in view.attributions)}
    if place is not None:
        evidence |= {"module": place, "relative": first}
    code = "EQ201" if place is not None else "EQ202"
    found = [Suspicion(code, [(freeze,)] if place is not None else [], evidence, step, 34)]
    # Where there is nothing to freeze: rows change with their company, and the weights are right.
    if place is None or not _freezable(view, freeze):
        found[0].proved = all(_weighted_right(view, each) for each in view.attributions)
        found[0].variants = []
        found[0].explains = frozenset({"gradients", "applied", "parameters", "state"})
        found[0].evidence["perturbation"] = (
            f"the same rows give other outputs of {place} in other company"
            if place is not None
            else "no module's rows change with their company, the loss of the full batch is no sum of theirs"
        )
    return found


def _freezable(view: View, freeze: Freeze) -> bool:
    view.experiment.reference((freeze,))
    return freeze.used


def _weighted_right(view: View, attribution: object) -> bool:
    """Return whether the accumulated gradient is in the span, with weights that add up as a mean's do."""
    from equivcheck.experiment import Attribution  # noqa: PLC0415

    assert isinstance(attribution, Attribution)
    if not view.spans(attribution, reference=False):
        return False
    k = attribution.pieces.shape[0]
    choices = [[1.0 / k] * k]
    for values in view.counts().values():
        counts = values[attribution.matched % len(values)]
        if len(counts) == k and sum(counts):
            choices.append([x / sum(counts) for x in counts])
    return any(view.fits(attribution, weights) for weights in choices)


def _first_coupled(view: View) -> tuple[str | None, float]:
    """Return the first module whose output for a row depends on the other rows, and by how much."""
    print_ = Fingerprint(view.experiment.cycles())
    try:
        view.experiment.reference((print_,))
        view.experiment.pieces((print_,))
    except Exception:  # noqa: BLE001 - a module that cannot be watched is not named; the verdict stands without
        return None, 0.0
    return print_.first_difference(view.experiment.terms())
