"""Factors that grow from stage to stage: EQ101, EQ102, EQ504 of parameters that each have a power of their own.

K micro-batches per cycle, R ranks. What a stage multiplies before it passes a gradient on comes to the stage before it
once, to the one before that twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from equivcheck.errors import EquivcheckError
from equivcheck.interventions import Reweight
from equivcheck.topology import another
from equivcheck.view import Suspicion, View

Powers = dict[str, int]
# Scales of whole tensors; noise is far below it, and the next power far above.
_SAME: Final = 1e-6


def suspect(view: View) -> list[Suspicion]:
    """Return a suspicion if all gradients are multiples of the full batch's, by different powers of K or of R."""
    if not view.divergent or view.experiment.case.world_size == 1:
        return []
    scales = _scales(view)
    rules = {
        letter: powers
        for letter, base in (("K", view.steps), ("R", view.experiment.case.world_size))
        if (powers := _powers(scales, base))
    }
    if len(rules) > 1:
        rules = _confirmed(view, rules)
    if len(rules) != 1:
        return []
    [(letter, powers)] = rules.items()
    base = float(view.steps if letter == "K" else view.experiment.case.world_size)
    groups: dict[float, list[str]] = {}
    for name, power in powers.items():
        groups.setdefault(base**power, []).append(name)
    put_right = tuple(
        Reweight(
            {
                view.cycle_of(a.matched): [1.0 / factor] * a.pieces.shape[0]
                for a in view.attributions
            },
            frozenset(names),
        )
        for factor, names in groups.items()
        if factor != 1.0
    )
    grows = max(powers.values()) > 0
    code = "EQ504" if letter == "R" else "EQ101" if grows else "EQ102"
    evidence: dict[str, object] = {
        "factors": {f"{factor:g}": sorted(names)[:5] for factor, names in groups.items()},
        "because": "what a stage passes on to the one before it is "
        f"{'multiplied' if grows else 'divided'} by {base:g} once more",
        "fix": "scale the loss alone, where the last stage computes it",
    }
    return [Suspicion(code, [put_right], evidence, view.divergent[0].step, 16)]


def _scales(view: View) -> dict[str, float]:
    """Return, of every parameter, the multiple of the full batch's gradient that it has; empty if one has none."""
    found: dict[str, float] = {}
    for each in view.divergent:
        for name, _ in each.names:
            part = each.only(frozenset({name}))
            size = float(part.reference @ part.reference)
            scale = float(part.candidate @ part.reference) / size if size else 0.0
            rest = float((part.candidate - scale * part.reference).norm())
            known = found.setdefault(name, scale)
            if (
                scale <= 0
                or rest > view.tolerance(part) * float(part.candidate.norm())
                or abs(known / scale - 1.0) > _SAME
            ):
                return {}
    return found


def _powers(scales: Mapping[str, float], base: int) -> Powers:
    """Return the power of a base that each scale is; empty if one is none, or there are not several of one sign."""
    if base == 1 or not scales:
        return {}
    powers = {name: round(math.log(scale, base)) for name, scale in scales.items()}
    if any(abs(float(base) ** powers[n] / scale - 1.0) > _SAME for n, scale in scales.items()):
        return {}
    signs = {each > 0 for each in powers.values() if each}
    return powers if len({*powers.values()} - {0}) > 1 and len(signs) == 1 else {}


def _confirmed(view: View, rules: Mapping[str, Powers]) -> dict[str, Powers]:
    """Return those rules that hold at another K too."""
    other = another(view)
    if other is None:
        return {}
    try:
        recording = view.experiment.at(other)
    except EquivcheckError:
        return {}
    bases = {"K": float(other), "R": float(view.experiment.case.world_size)}
    steps = [each for each in recording.steps if each.matched is not None and each.gradients]
    return {
        letter: powers
        for letter, powers in rules.items()
        if steps
        and all(
            abs(step.gradients[name].scale / bases[letter] ** power - 1.0) <= _SAME
            for step in steps
            for name, power in powers.items()
            if name in step.gradients
        )
    }
