"""One addend of the loss with a wrong factor: EQ106, EQ107."""

from __future__ import annotations

import torch

from equivcheck.attribution import predict, solve
from equivcheck.interventions import Addend, Addends, ordinal_of
from equivcheck.recording import Place, Recording
from equivcheck.view import Suspicion, View

Component = tuple[int, tuple[int, ...]]
Taken = dict[tuple[int, ...], dict[str, torch.Tensor]]


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion if some addends of the loss agree with the full batch and others do not."""
    experiment = view.experiment
    if not view.divergent or any(isinstance(each, Addend) for each in view.chosen):
        return []
    names = view.divergent[0].names
    try:
        alone = _taken(view, "pieces", names)
        accumulated = _taken(view, "candidate", names)
        whole = _taken(view, "reference", names)
    except Exception:  # noqa: BLE001 - a graph that cannot be walked twice has no addends to tell apart
        return []
    components = sorted({component for by_place in alone.values() for component in by_place})
    if len(components) < 2:  # noqa: PLR2004
        return []
    found = []
    for component in components:
        suspicion = _wrong(view, component, alone, accumulated, whole)
        if suspicion is not None:
            found.append(suspicion)
    # If every addend is wrong, it is the whole loss that is.
    del experiment
    return found if len(found) < len(components) else []


def _taken(
    view: View, role: str, names: list[tuple[str, int]]
) -> dict[tuple[int, int], dict[Component, torch.Tensor]]:
    """Return, by cycle and micro-step, the gradient of every addend."""
    experiment = view.experiment
    taker = Addends()
    taker.both = role != "candidate"
    chosen = (*view.chosen, taker)
    recording: Recording
    if role == "reference":
        recording = experiment.reference(chosen)
        places = recording.places(view.cycles)
    elif role == "pieces":
        experiment.pieces(chosen)
        recording = experiment.pieces_recording(chosen)
        places = recording.places(view.cycles)
    else:
        recording = experiment.candidate(chosen)
        places = view.places
    found: dict[tuple[int, int], dict[Component, torch.Tensor]] = {}
    for index, (place, by_path) in enumerate(zip(places, taker.taken.get(role, []), strict=False)):
        here = found.setdefault((place.cycle, place.micro_step), {})
        for path, gradients in by_path.items():
            parts = [gradients.get(name, torch.zeros(length, dtype=torch.float64)) for name, length in names]
            here[_ordinal(places, index), path] = torch.cat(parts)
    return found


def _ordinal(places: list[Place], index: int) -> int:
    return ordinal_of(places, index)


def _wrong(
    view: View,
    component: Component,
    alone: dict[tuple[int, int], dict[Component, torch.Tensor]],
    accumulated: dict[tuple[int, int], dict[Component, torch.Tensor]],
    whole: dict[tuple[int, int], dict[Component, torch.Tensor]],
) -> Suspicion | None:
    factors: dict[int, list[float]] = {}
    evidence: dict[str, object] = {}
    same_everywhere = True
    step = 0
    for each in view.attributions:
        cycle = min((view.cycles[key] for key in view.reference.steps[each.matched].samples), default=each.matched)
        k = each.pieces.shape[0]
        pieces = [alone.get((cycle, i), {}).get(component) for i in range(k)]
        parts = [accumulated.get((cycle, i), {}).get(component) for i in range(k)]
        target = whole.get((cycle, 0), {}).get(component)
        if target is None or any(x is None for x in pieces) or any(x is None for x in parts):
            return None
        matrix = torch.stack([x for x in pieces if x is not None])
        total = torch.stack([x for x in parts if x is not None]).sum(0)
        size = float(target.norm())
        limit = view.tolerance(each)
        if not size or float((total - target).norm()) <= limit * max(size, float(matrix.norm())):
            continue
        same = float((matrix - matrix[0]).norm()) <= limit * float(matrix.norm())
        same_everywhere &= same
        right = [1.0 / k] * k if same else solve(matrix, target).solution
        ones, scaled = [1.0] * k, [x * k for x in right]
        for wrong in (ones, scaled, [x / k for x in right]):
            gap = float((predict(matrix, wrong) - total).norm())
            if gap <= limit * max(float(total.norm()), float(matrix.norm())):
                factors[cycle] = [v / w if w else 1.0 for v, w in zip(right, wrong, strict=True)]
                if not evidence:
                    evidence = {
                        "addend": list(component[1]) or f"backward {component[0]}",
                        "times": float(total.norm()) / size,
                        "same_in_every_micro_batch": same,
                    }
                    step = each.step
                break
        else:
            return None
    if not factors:
        return None
    code = "EQ107" if same_everywhere else "EQ106"
    return Suspicion(code, [(Addend(*component, factors),)], evidence, step, 16)
