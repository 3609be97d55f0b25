"""One addend of the loss with a wrong factor: EQ106, EQ107."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from equivcheck.attribution import predict, solve
from equivcheck.errors import EquivcheckError
from equivcheck.fit import Attribution
from equivcheck.interventions import Addend, Addends, Intervention, ordinal_of
from equivcheck.view import Suspicion, View

Component = tuple[int, tuple[int, ...]]
ByPlace = dict[tuple[int, int], dict[Component, torch.Tensor]]


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
    if not found or (len(found) == len(wrong) and len({each.rule for each in found.values()}) == 1):
        return []  # Nothing is wrong; or the whole loss is, in one way.
    main = max(parts.components, key=lambda c: _size(view, c, parts))
    by_code: dict[str, list[Component]] = {}
    for component, each in found.items():
        code = "EQ107" if each.same else each.rule if component == main else "EQ106"
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
    return max((float(each.norm()) for each in mine), default=0.0)


def addend_parts(view: View) -> Parts | None:
    """Return the gradients of the addends, or None where the loss has only one, or the graph cannot be walked."""
    cache = view.experiment.remembered
    key = ("addends", view.chosen)
    if key not in cache:
        cache[key] = _parts(view)
    return cache[key]  # type: ignore[no-any-return]


def _parts(view: View) -> Parts | None:
    attributions = view.attributions
    if not attributions:
        return None
    names = attributions[0].names
    try:
        alone = _taken(view, "pieces", names)
        if max((len(each) for each in alone.values()), default=0) < 2:
            return None
        return Parts(alone, _taken(view, "candidate", names), _taken(view, "reference", names))
    except (EquivcheckError, RuntimeError):
        # A graph that cannot be walked twice has no addends to tell apart.
        return None


def spanned(view: View) -> bool:
    """Return whether the full batch is made of the micro-batches' addends, each with weights of its own."""
    parts = addend_parts(view)
    if parts is None:
        return False
    for each in view.attributions:
        cycle = view.cycle_of(each.matched)
        matrix = []
        for component in parts.components:
            pieces = [
                parts.alone.get((cycle, i), {}).get(component) for i in range(each.pieces.shape[0])
            ]
            if any(x is None for x in pieces):
                return False
            matrix += [x for x in pieces if x is not None]
        fit = solve(torch.stack(matrix), each.reference)
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
        cycle, k = view.cycle_of(each.matched), each.pieces.shape[0]
        limit = view.tolerance(each)
        for component in parts.components:
            alone = [parts.alone.get((cycle, i), {}).get(component) for i in range(k)]
            mine = [parts.accumulated.get((cycle, i), {}).get(component) for i in range(k)]
            target = parts.whole.get((cycle, 0), {}).get(component)
            if target is None or any(x is None for x in (*alone, *mine)):
                return False
            matrix = torch.stack([x for x in alone if x is not None])
            total = torch.stack([x for x in mine if x is not None]).sum(0)
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


def _taken(view: View, role: str, names: list[tuple[str, int]]) -> ByPlace:
    """Return, by cycle and micro-step, the gradient of every addend."""
    experiment = view.experiment
    taker = Addends()
    taker.both = role != "candidate"
    chosen = (*view.chosen, taker)
    if role == "reference":
        places = experiment.reference(chosen).places(view.cycles)
    elif role == "pieces":
        places = experiment.pieces_recording(chosen).places(view.cycles)
    else:
        experiment.candidate(chosen)
        places = view.places
    found: ByPlace = {}
    for index, (place, by_path) in enumerate(zip(places, taker.taken.get(role, []), strict=False)):
        here = found.setdefault((place.cycle, place.micro_step), {})
        for path, gradients in by_path.items():
            parts = [
                gradients.get(name, torch.zeros(length, dtype=torch.float64))
                for name, length in names
            ]
            here[ordinal_of(places, index), path] = torch.cat(parts)
    return found


def _same(view: View, component: Component, parts: Parts) -> bool:
    """Return whether an addend has the same gradient in every micro-batch of a cycle."""
    several = False
    for each in view.attributions:
        cycle, k = view.cycle_of(each.matched), each.pieces.shape[0]
        pieces = [parts.alone.get((cycle, i), {}).get(component) for i in range(k)]
        matrix = (
            torch.stack([x for x in pieces if x is not None])
            if any(x is not None for x in pieces)
            else None
        )
        if matrix is None or matrix.shape[0] < 2:
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
    for each in view.attributions:
        cycle = view.cycle_of(each.matched)
        k = each.pieces.shape[0]
        pieces = [parts.alone.get((cycle, i), {}).get(component) for i in range(k)]
        mine = [parts.accumulated.get((cycle, i), {}).get(component) for i in range(k)]
        target = parts.whole.get((cycle, 0), {}).get(component)
        if target is None or any(x is None for x in pieces) or any(x is None for x in mine):
            return False
        matrix = torch.stack([x for x in pieces if x is not None])
        total = torch.stack([x for x in mine if x is not None]).sum(0)
        size = max(float(target.norm()), float(matrix.norm()))
        limit = view.tolerance(each)
        if float((total - target).norm()) <= limit * size:
            continue
        right = [1.0 / k] * k if same else solve(matrix, target).solution
        wrongs: list[tuple[str, list[float]]] = [
            ("EQ101", [1.0] * k),
            ("EQ101", [x * k for x in right]),
            ("EQ105" if k != view.steps else "EQ102", [x / k for x in right]),
            ("EQ105" if k != view.steps else "EQ103", [1.0 / view.steps] * k),
            ("EQ105" if k != view.steps else "EQ102", [x * k / view.steps for x in right]),
            ("EQ103", [1.0 / k] * k),
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
