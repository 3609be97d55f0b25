"""One addend of the loss with a wrong factor: EQ106, EQ107."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from equivcheck.attribution import predict, solve
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import ByPlace
from equivcheck.fit import Attribution
from equivcheck.interventions import Addend, Addends, Intervention, ordinal_of
from equivcheck.recording import Place
from equivcheck.view import Suspicion, View

Component = tuple[int, tuple[int, ...]]
Gradient = dict[str, torch.Tensor]

# One addend with another factor than the rest is the side term, however large its gradient is.
_FACTORS = ("EQ101", "EQ102")


@dataclass
class Parts:
    """Gradients of every addend: of the micro-batches alone, accumulated, and of the full batch."""

    alone: ByPlace
    accumulated: ByPlace
    whole: ByPlace

    @property
    def components(self) -> list[Component]:
        """Every addend that any micro-batch has."""
        return sorted({component for by_place in self.alone.values() for component in by_place})

    def pieces(
        self, attribution: Attribution, cycle: int, component: Component, *, accumulated: bool
    ) -> torch.Tensor | None:
        """Return [K, n] an addend's gradients, over the parameters of one attribution; None if one lacks it."""
        by_place = self.accumulated if accumulated else self.alone
        found = [
            by_place.get((cycle, i), {}).get(component) for i in range(attribution.pieces.shape[0])
        ]
        if any(each is None for each in found):
            return None
        return torch.stack([_flat(each, attribution) for each in found if each is not None])

    def absent(self, attribution: Attribution, cycle: int, component: Component) -> list[int]:
        """Return the micro-steps whose backward, in the accumulated run, has not the addend."""
        steps = range(attribution.pieces.shape[0])
        return [k for k in steps if component not in self.accumulated.get((cycle, k), {})]

    def accumulated_total(
        self, attribution: Attribution, cycle: int, component: Component
    ) -> torch.Tensor:
        """Return [n] the sum of an addend's gradients in the accumulated run, of the micro-steps that have it."""
        found = torch.zeros_like(attribution.candidate)
        for k in range(attribution.pieces.shape[0]):
            gradient = self.accumulated.get((cycle, k), {}).get(component)
            if gradient is not None:
                found += _flat(gradient, attribution)
        return found

    def target(
        self, attribution: Attribution, cycle: int, component: Component
    ) -> torch.Tensor | None:
        """Return [n] an addend's gradient of the full batch."""
        found = self.whole.get((cycle, 0), {}).get(component)
        return None if found is None else _flat(found, attribution)


def _flat(gradient: Gradient, attribution: Attribution) -> torch.Tensor:
    parts = [
        gradient.get(name, torch.zeros(length, dtype=torch.float64))
        for name, length in attribution.names
    ]
    return torch.cat(parts)


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion if some addends of the loss agree with the full batch and others do not."""
    if not view.divergent:
        return []
    parts = addend_parts(view)
    if parts is None:
        return []
    wrong = {component: _wrong(view, component, parts) for component in parts.components}
    if any(each is False for each in wrong.values()):
        return []  # Something that no factor explains.
    found = {component: each for component, each in wrong.items() if isinstance(each, _Wrong)}
    alike = len(found) == len(wrong) and len({each.rule for each in found.values()}) == 1
    if not found or (alike and all(view.spans(each, reference=True) for each in view.attributions)):
        return []  # Nothing is wrong; or the whole loss is, in one way, with weights of its own.
    main = max(parts.components, key=lambda c: _size(view, c, parts))
    if len(found) == 1 and len(wrong) > 1 and main in found and found[main].rule in _FACTORS:
        main = next(component for component in parts.components if component != main)
    means = [component for component, each in found.items() if each.rule == "EQ103"]
    if means and main in found and found[main].rule == "EQ102":
        main = means[
            0
        ]  # A sum that is divided as if it were a mean stands beside means, and may be larger than they.
    by_code: dict[str, list[Component]] = {}
    for component, each in found.items():
        code = "EQ107" if each.same else each.rule if component == main or alike else "EQ106"
        by_code.setdefault(code, []).append(component)
    suspicions = []
    for code, components in by_code.items():
        interventions: tuple[Intervention, ...] = tuple(
            Addend(*c, found[c].factors) for c in components
        )
        first = found[components[0]]
        evidence = {
            "addends": [list(path) or f"backward {ordinal}" for ordinal, path in components][:4],
            "times": first.times,
            "same_in_every_micro_batch": first.same,
        }
        suspicions.append(Suspicion(code, [interventions], evidence, first.step, 16))
    return suspicions


def _size(view: View, component: Component, parts: Parts) -> float:
    """Return how large an addend's gradient is; one that is the same everywhere is no main loss."""
    if _same(view, component, parts):
        return 0.0
    mine = [by_place[component] for by_place in parts.alone.values() if component in by_place]
    return max((float(torch.cat([*each.values()]).norm()) for each in mine if each), default=0.0)


def addend_parts(view: View) -> Parts | None:
    """Return the gradients of the addends, or None where the loss has only one, or the graph cannot be walked."""
    cache = view.experiment.remembered
    key = ("addends", view.chosen)
    if key not in cache:
        cache[key] = _parts(view)
    return cache[key]  # type: ignore[no-any-return]


def _parts(view: View) -> Parts | None:
    try:
        if _one_each(view):
            return None
        alone = _taken(view, "pieces")
        if max((len(each) for each in alone.values()), default=0) < 2:
            return None
        whole = _taken(view, "reference")
        accumulated = _taken(view, "candidate")
        _forget_divisions_by_zero(alone, accumulated)
        parts = Parts(view.experiment.addends_alone(alone, whole), accumulated, whole)
    except (EquivcheckError, RuntimeError):
        # A graph that cannot be walked twice has no addends to tell apart, nor micro-batches that are refused alone.
        return None
    return parts if view.experiment.crew is None else _reduced(view, parts)


def _one_each(view: View) -> bool:
    """Return whether every micro-batch has one backward, from a loss that is no sum: there is nothing to tell apart."""
    recording = view.experiment.pieces_recording(view.chosen)
    found = Counter(
        (place.cycle, place.micro_step)
        for place in recording.places(view.cycles)
        if place.cycle >= 0
    )
    return all(each.addends == 1 for each in recording.backwards) and set(found.values()) == {1}


def _reduced(view: View, parts: Parts) -> Parts | None:
    """Return the addends as they are in gradients that the ranks have reduced; None if no factor makes them so.

    What a rank's backward gives is its own: the reduction takes the mean of the ranks, or their sum. Which, the
    gradients show in which all addends are together.
    """
    factor: float | None = None
    for each in view.attributions:
        cycle = view.cycle_of(each.matched)
        total = torch.zeros_like(each.candidate)
        for component in parts.components:
            mine = parts.pieces(each, cycle, component, accumulated=True)
            if mine is None:
                return None
            total += mine.sum(0)
        size = float(total @ total)
        if factor is None and size:
            factor = float(each.candidate @ total) / size
        rest = each.candidate - (factor or 0.0) * total
        if not float(rest.norm()) <= view.tolerance(each) * float(each.candidate.norm()):
            return None
    if not factor:
        return None
    for by_component in parts.accumulated.values():
        for gradient in by_component.values():
            for tensor in gradient.values():
                tensor.mul_(factor)
    return parts


def _forget_divisions_by_zero(alone: ByPlace, accumulated: ByPlace) -> None:
    """Give addends no gradient that have none in the cycle, and are 0 / 0 in a micro-batch alone that holds nothing."""
    for place, by_component in alone.items():
        for component, gradient in by_component.items():
            added = accumulated.get(place, {}).get(component, {})
            for name, tensor in gradient.items():
                other = added.get(name)
                if other is not None and not tensor.isfinite().all() and not other.any():
                    gradient[name] = torch.zeros_like(tensor)


def spanned(view: View) -> bool:
    """Return whether the full batch is made of the micro-batches' addends, each with weights of its own."""
    parts = addend_parts(view)
    if parts is None:
        return False
    for each in view.attributions:
        cycle = view.cycle_of(each.matched)
        matrix = []
        for component in parts.components:
            pieces = parts.pieces(each, cycle, component, accumulated=False)
            if pieces is None:
                return False
            matrix.append(pieces)
        fit = solve(torch.cat(matrix), each.reference)
        if fit.residual is None or fit.residual > view.tolerance(each):
            return False
    return True


def coupled_addends(view: View, shares: Callable[[View, Attribution], list[list[float]]]) -> bool:
    """Return whether those addends that differ are coupled, and accumulated with the weights of a mean.

    Coupled: the full batch's addend is no sum of the micro-batches'.
    """
    parts = addend_parts(view)
    if parts is None:
        return False
    coupled = False
    for each in view.attributions:
        cycle = view.cycle_of(each.matched)
        limit = view.tolerance(each)
        for component in parts.components:
            matrix = parts.pieces(each, cycle, component, accumulated=False)
            mine = parts.pieces(each, cycle, component, accumulated=True)
            target = parts.target(each, cycle, component)
            if matrix is None or mine is None or target is None:
                return False
            total = mine.sum(0)
            size = max(float(target.norm()), float(matrix.norm()))
            if float((total - target).norm()) <= limit * size:
                continue
            residual = solve(matrix, target).residual
            right = any(
                float((predict(matrix, w) - total).norm()) <= limit * size
                for w in shares(view, each)
            )
            if residual is None or residual <= limit or not right:
                return False
            coupled = True
    return coupled


def _taken(view: View, role: str) -> ByPlace:
    """Return, by cycle and micro-step, the gradient of every addend."""
    experiment = view.experiment
    taker = Addends()
    taker.both = role != "candidate"
    chosen = (*view.chosen, taker)
    found: ByPlace = {}
    if role == "reference":
        _sort(found, experiment.reference(chosen).places(view.cycles), taker.taken, (role, 0))
    elif role == "pieces":
        places = experiment.pieces_recording(chosen).places(view.cycles)
        _sort(found, places, taker.taken, (role, 0))
    else:
        experiment.candidate(chosen)
        written = experiment.candidate()
        for rank, each in enumerate(written.ranks or [written]):
            _sort(found, each.places(view.cycles), taker.taken, (role, rank))
    return found


def _sort(
    found: ByPlace,
    places: Sequence[Place],
    taken: Mapping[tuple[str, int], Sequence[Mapping[tuple[int, ...], Gradient]]],
    key: tuple[str, int],
) -> None:
    """Sort what one rank's backwards gave into its place: the micro-batches of rank 0 come first, then rank 1's."""
    for index, (place, by_path) in enumerate(zip(places, taken.get(key, ()), strict=False)):
        position = key[1] * place.micro_steps + place.micro_step
        here = found.setdefault((place.cycle, position), {})
        for path, gradients in by_path.items():
            here[ordinal_of(places, index), path] = gradients


def _same(view: View, component: Component, parts: Parts) -> bool:
    """Return whether an addend has the same gradient in every micro-batch of a cycle."""
    several = False
    for each in view.attributions:
        matrix = parts.pieces(each, view.cycle_of(each.matched), component, accumulated=False)
        if matrix is None or matrix.shape[0] < 2 or not bool(matrix.any()):
            continue
        several = True
        if float((matrix - matrix[0]).norm()) > view.tolerance(each) * float(matrix.norm()):
            return False
    return several


@dataclass
class _Wrong:
    """How one addend is wrong.

    Attributes:
        same: Its gradient is the same in every micro-batch: a penalty on the weights.
        times: Its size, accumulated over the full batch's.
        rule: The code that its weights would have as those of a whole loss.
    """

    same: bool
    times: float
    step: int
    factors: dict[int, list[float]]
    rule: str


def _wrong(view: View, component: Component, parts: Parts) -> _Wrong | bool | None:
    """Return how one addend is wrong; None if it is right, False if no factor explains it."""
    found: _Wrong | None = None
    same = _same(view, component, parts)
    for each in view.divergent:
        cycle = view.cycle_of(each.matched)
        k = each.pieces.shape[0]
        matrix = parts.pieces(each, cycle, component, accumulated=False)
        mine = parts.pieces(each, cycle, component, accumulated=True)
        target = parts.target(each, cycle, component)
        if matrix is None or mine is None or target is None:
            return False
        total = mine.sum(0)
        size = max(float(target.norm()), float(matrix.norm()))
        limit = view.tolerance(each)
        if float((total - target).norm()) <= limit * size:
            continue
        right = [1.0 / k] * k if same else solve(matrix, target).solution
        steps, ranks = each.micro_steps, each.ranks
        is_tail = steps != view.steps
        wrongs: list[tuple[str, list[float]]] = [
            ("EQ101", [1.0 / ranks] * k),
            ("EQ101", [x * steps for x in right]),
            ("EQ105" if is_tail else "EQ102", [x / steps for x in right]),
            ("EQ105" if is_tail else "EQ103", [1.0 / (view.steps * ranks)] * k),
            ("EQ105" if is_tail else "EQ102", [x * steps / view.steps for x in right]),
            ("EQ103", [1.0 / k] * k),
            ("EQ102", [1.0 / (k * steps)] * k),  # a mean of means, divided once more
        ]
        for values in view.counts().values():
            counts = values[each.matched % len(values)]
            if len(counts) == k and sum(counts) > 0:
                wrongs.append(("EQ103", [x / sum(counts) for x in counts]))
        bound = limit * max(size, float(total.norm()))
        fitting = next(
            (
                (code, w)
                for code, w in wrongs
                if float((predict(matrix, w) - total).norm()) <= bound
            ),
            None,
        )
        if fitting is None:
            return False
        if found is None:
            times = float(total.norm()) / (float(target.norm()) or 1.0)
            found = _Wrong(same, times, each.step, {}, fitting[0])
        found.factors[cycle] = [v / w if w else 1.0 for v, w in zip(right, fitting[1], strict=True)]
    return found
