"""Put what several ranks saw together: one recording of what they did to the model between them.

Tensors that every rank holds whole are replicas: the rank that is furthest off counts. Parts of a tensor add up.
Copies of the weights that the loop keeps are those of the first rank that has them, which saves them: others need not
keep theirs up. Where some ranks take no optimizer step at all, those that do speak for all. Whatever is not a tensor
(the timeline, the backwards) is rank 0's; `Recording.ranks` has the others.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch

from equivcheck.differences import Sums
from equivcheck.feed import Key
from equivcheck.parts import WHOLE
from equivcheck.recording import Recording, Step
from equivcheck.states import numbers


def merged(ranks: Sequence[Recording], reference: Recording) -> Recording:
    """Return one recording for what several ranks did together."""
    steps = []
    stepping = [each for each in ranks if each.steps]
    given = {key for each in ranks if not each.steps for keys in each.fetched for key in keys}
    for index in range(max(len(each.steps) for each in ranks)):
        taken = [each.steps[index] for each in stepping if index < len(each.steps)]
        steps.append(_step(index, taken, len(stepping), given, reference))
    lowered: dict[str, str] = {}
    for each in ranks:
        lowered |= each.lowered
    return replace(
        ranks[0],
        steps=steps,
        optimizers=reference.optimizers,
        ranks=list(ranks),
        lowered=lowered,
        dropout=any(each.dropout for each in ranks),
        random_drawn=any(each.random_drawn for each in ranks),
        unseeded=any(each.unseeded for each in ranks),
        seconds=max(each.seconds for each in ranks),
    )


def _step(
    index: int, taken: Sequence[Step], stepping: int, given: set[Key], reference: Recording
) -> Step:
    """Return one optimizer step of all ranks.

    Args:
        index: Which.
        taken: That of each rank that got so far.
        stepping: How many ranks take optimizer steps.
        given: The samples of those that take none.
        reference: The full-batch run.
    """
    first = taken[0]
    samples = frozenset().union(*(each.samples for each in taken))
    matches = {each.matched for each in taken}
    matched = first.matched if len(matches) == 1 and len(taken) == stepping else None
    target = reference.steps[matched] if matched is not None else None
    if target is not None:
        samples |= target.samples & given
    if target is not None and target.samples != samples:
        matched, target = None, None
    absent = list(dict.fromkeys(name for each in taken for name in each.none_mismatch))
    if target is not None:
        held = {name for each in taken for name in each.sample}
        absent += [n for n, s in target.sample.items() if s is not None and n not in held]
        absent += _absent_state(taken, reference, target.index)
    rates = [each.learning_rates for each in taken]
    other = [r for r in rates if target is not None and r != target.learning_rates]
    return replace(
        first,
        index=index,
        samples=samples,
        matched=matched,
        optimizer=target.optimizer if target is not None else first.optimizer,
        missing=max(each.missing for each in taken),
        learning_rates=other[0] if other else rates[0],
        norm=_norm(taken),
        clipped=any(each.clipped for each in taken),
        skipped=any(each.skipped for each in taken),
        finite=all(each.finite for each in taken),
        sample=_sample(taken),
        gradients=_sums(taken, [each.gradients for each in taken]),
        applied=_sums(taken, [each.applied for each in taken]),
        parameters=_sums(taken, [each.parameters for each in taken]),
        state=_sums(taken, [each.state for each in taken]),
        buffers=_sums(taken, [each.buffers for each in taken]),
        shadows=_shadows(taken),
        none_mismatch=absent,
        contributions=[each for step in taken for each in step.contributions],
        parts={},
    )


def _shadows(taken: Sequence[Step]) -> dict[str, Sums]:
    """Return what the first rank that has copies saw of them; of copies that are sharded, what all saw together."""
    having = [each for each in taken if each.shadows]
    if any(name in each.parts for each in having for name in each.shadows):
        return _sums(having, [each.shadows for each in having])
    return having[0].shadows if having else {}


def _absent_state(taken: Sequence[Step], reference: Recording, matched: int) -> list[str]:
    """Return the entries of the reference's optimizer state that no rank has; none where it was not compared."""
    found = {name for each in taken for name in each.state}
    if not found:
        return []
    kept = reference.kept[matched].state
    wanted = [f"{name}.{key}" for name, entries in kept.items() for key, _ in numbers(entries)]
    return [name for name in wanted if name not in found]


def part_of(step: Step, name: str) -> Hashable:
    """Return which part of a tensor a rank holds; entries of an optimizer's state lie like their parameter."""
    if name in step.parts:
        return step.parts[name]
    return step.parts.get(name.rpartition(".")[0], WHOLE)


def _sums(taken: Sequence[Step], found: Sequence[dict[str, Sums]]) -> dict[str, Sums]:
    result: dict[str, Sums] = {}
    names = dict.fromkeys(name for each in found for name in each)
    for name in names:
        worst: dict[Hashable, Sums] = {}
        for step, sums in zip(taken, found, strict=True):
            if name in sums:
                key = part_of(step, name)
                worst[key] = max((worst.get(key, sums[name]), sums[name]), key=_badness)
        total = Sums()
        for each in worst.values():
            total = total + each
        result[name] = total
    return result


def _badness(sums: Sums) -> float:
    return sums.dd if sums.finite else math.inf


def _sample(taken: Sequence[Step]) -> dict[str, torch.Tensor | None]:
    """Return the sampled coordinates of every gradient: nan marks those that a rank does not hold."""
    result: dict[str, torch.Tensor | None] = {}
    for name in dict.fromkeys(name for each in taken for name in each.sample):
        found: torch.Tensor | None = None
        for each in taken:
            mine = each.sample.get(name)
            if mine is None:
                continue
            if name not in each.parts:
                found = mine if found is None else found
                continue
            found = mine.clone() if found is None else torch.where(found.isnan(), mine, found)
        result[name] = found
    return result


def _norm(taken: Sequence[Step]) -> float:
    squares: dict[Hashable, float] = {}
    for step in taken:
        # Ranks that hold the same parts have the same norm, or the same fault.
        squares.setdefault(tuple(sorted(step.parts.items(), key=repr)), step.norm**2)
    return math.sqrt(sum(squares.values()))
