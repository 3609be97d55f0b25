"""Pieces of a script: what each backward of the accumulated run adds, from the state that its cycle starts from.

K micro-batches, n sampled coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from equivcheck.attach.store import Facts
from equivcheck.attribution import Weights, solve
from equivcheck.experiment import ByPlace
from equivcheck.feed import Key
from equivcheck.fit import BEYOND_ROUNDING, Attribution, attribute, sampled
from equivcheck.recording import Kept, Recording, Step

__all__ = ["addends_of", "attribution_of", "pieces_of"]

Coordinates = dict[str, torch.Tensor]


def pieces_of(
    alone: Recording, facts: Sequence[Facts], cycles: Mapping[Key, int]
) -> dict[int, list[Coordinates]]:
    """Return, by the full batch's step, what the backwards of each micro-batch (and rank) add, without a loss scale."""
    found: dict[int, list[Coordinates]] = {}
    places = alone.places(dict(cycles))
    for each in facts:
        by_step: dict[tuple[int, int], Coordinates] = {}
        for place, backward, added in zip(
            places, alone.backwards, each.contributions, strict=False
        ):
            if place.cycle < 0:
                continue
            total = by_step.setdefault((place.cycle, place.micro_step), {})
            for name, values in added.items():
                share = values / backward.loss_scale
                total[name] = total[name] + share if name in total else share
        for (cycle, _), coordinates in sorted(by_step.items()):
            found.setdefault(cycle, []).append(coordinates)
    return found


def attribution_of(
    step: Step,
    target: Step,
    pieces: Sequence[Coordinates],
    start: Kept | None,
    *,
    is_sum: bool,
    ranks: int = 1,
) -> Attribution:
    """Return the weights of one cycle, the pieces scaled so that the full batch's weights add up to 1.

    What a backward adds carries whatever factor the loop gives it, so that only ratios of weights can be seen; those
    of a mean add up to 1, and those of a sum are 1 each.

    Args:
        step: The candidate's.
        target: The full batch's, of the same samples.
        pieces: What each micro-batch adds.
        start: The state that the cycle starts from.
        is_sum: The full batch's loss is a sum over its samples.
        ranks: How many ranks share the batch.
    """
    raw = attribute(
        step, target, [_as_step(target, each) for each in pieces], sampled(start), ranks
    )
    total = sum(raw.v.solution)
    wanted = float(len(pieces)) if is_sum else 1.0
    if not total or raw.v.residual is None:
        return raw
    factor = total / wanted
    matrix = raw.pieces * factor
    return replace(raw, pieces=matrix, v=_scaled(raw.v, factor), w=solve(matrix, raw.candidate))


def addends_of(alone: ByPlace, whole: ByPlace, *, is_sum: bool) -> ByPlace:
    """Return the addends of each micro-batch alone, scaled by what the full batch makes of each of them.

    One that is the same in every micro-batch is a penalty on the weights: the full batch has it once.

    Args:
        alone: What each addend adds in the accumulated run, with whatever factor the loop gives it.
        whole: The same of the full batch.
        is_sum: The full batch's loss is a sum over its samples.
    """
    found = {place: dict(by_component) for place, by_component in alone.items()}
    for cycle in sorted({cycle for cycle, _ in alone}):
        places = sorted(place for place in alone if place[0] == cycle)
        for component, target in whole.get((cycle, 0), {}).items():
            mine = [alone[place].get(component) for place in places]
            rows = [_flat(each, target) for each in mine if each is not None]
            if len(rows) < len(mine):
                continue
            matrix = torch.stack(rows)
            total = sum(solve(matrix, _flat(target, target)).solution)
            is_same = float((matrix - matrix[0]).norm()) <= BEYOND_ROUNDING * float(matrix.norm())
            factor = total / (len(rows) if is_sum and not is_same else 1)
            if not factor:
                continue
            for place in places:
                found[place][component] = {
                    name: values * factor for name, values in alone[place][component].items()
                }
    return found


def _flat(gradient: Coordinates, like: Coordinates) -> torch.Tensor:
    parts = [gradient.get(name, torch.zeros_like(values)) for name, values in like.items()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _scaled(weights: Weights, factor: float) -> Weights:
    return replace(
        weights,
        values=[None if each is None else each / factor for each in weights.values],
        solution=[each / factor for each in weights.solution],
    )


def _as_step(target: Step, piece: Coordinates) -> Step:
    return Step(
        index=-1,
        optimizer=target.optimizer,
        samples=frozenset(),
        backwards=0,
        first_backward=0,
        learning_rates=[],
        sample=dict(piece),
    )
