"""Judge one run against the reference, in the noise that the control measured.

A *finding* is one thing that differs: of a kind, at an optimizer step, with its number and the number allowed. No
finding means the same function. Nothing here runs user code.

N samples behind one optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from equivcheck.comparers import NOISY_ELEMENT
from equivcheck.differences import Sums
from equivcheck.noise import SAFETY, UNIT_ROUNDOFF, floor, gamma
from equivcheck.recording import Recording, Step

_ROUNDOFF: Final = 2.0**-53
# A control that differs by this many roundings is no control: see DESIGN, "The control".
UNFIT: Final = 1e4
# Elements whose gradients agree to NOISY_ELEMENT may be changed by an optimizer in proportion to it; Adam's ratio
# m / sqrt(v) has a condition of about 2, SAFETY covers steeper ones.
UPDATE_NOISE: Final = SAFETY * NOISY_ELEMENT

KINDS = (
    "samples",
    "none",
    "gradients",
    "applied",
    "parameters",
    "state",
    "buffers",
    "learning_rates",
    "shadows",
    "logged",
)


@dataclass(frozen=True)
class Finding:
    """One thing that differs.

    Attributes:
        kind: One of KINDS.
        step: Index of the candidate's optimizer step; -1 for the whole run.
        matched: Index of the reference's step; -1 if there is none.
        names: Tensors concerned, worst first.
        relative: Measured difference.
        allowed: What correct code may show.
    """

    kind: str
    step: int
    matched: int
    names: tuple[str, ...]
    relative: float
    allowed: float
    detail: str = ""


@dataclass
class Judgement:
    """What was found, and how fine the comparison was.

    Attributes:
        findings: In order of the run; empty if it is the same function.
        margin: Smallest allowed over measured, over all gradients; inf if none differed at all.
        power: Smallest relative fault of a gradient that would have been seen.
        compared: Number of tensor pairs.
        zero: Per reference step, parameters whose gradient is zero but for rounding.
        left: The run whose parameters were judged where the loop leaves them, and not at its steps; None for most.
    """

    findings: list[Finding] = field(default_factory=list)
    margin: float = math.inf
    power: float = 0.0
    compared: int = 0
    zero: dict[int, set[str]] = field(default_factory=dict)
    left: Recording | None = None

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.findings

    def kinds(self) -> set[str]:
        """Return the kinds of all findings."""
        return {each.kind for each in self.findings}

    def first(self, *kinds: str) -> Finding | None:
        """Return the first finding of some kinds."""
        return next((each for each in self.findings if each.kind in kinds), None)


@dataclass
class Noise:
    """What the controls measured, per reference step.

    Attributes:
        terms: Samples (times the length of a sample) behind one step.
        roundoff: Unit roundoff of the lowest precision that really computed.
        controls: Recordings of permuted full-batch runs; the largest difference counts.
        accumulation_steps: K; only low precision loses more with it.
        pieces_norm: Per step and parameter, the summed norms of the pieces, if they were taken.
    """

    terms: int
    controls: Sequence[Recording]
    roundoff: float = _ROUNDOFF
    accumulation_steps: int = 1
    pieces_norm: dict[tuple[int, str], float] = field(default_factory=dict)
    _indexed: tuple[list[int], dict[int, list[Step]]] = field(
        default_factory=lambda: ([], {}), repr=False
    )

    def _steps(self, matched: int) -> Sequence[Step]:
        """Return the controls' steps that match a reference step, found once for all of them."""
        known, index = self._indexed
        now = [id(control) for control in self.controls]
        if known != now:
            index = {}
            for control in self.controls:
                for step in control.steps:
                    if step.matched is not None:
                        index.setdefault(step.matched, []).append(step)
            self._indexed = now, index
        return index.get(matched, ())

    def limit(
        self, matched: int, which: Callable[[Step], dict[str, Sums]], name: str, size: float
    ) -> float:
        """Return the absolute difference that one tensor of norm `size` may show."""
        return max(
            SAFETY * self.of(matched, which, name),
            self.floor() * size,
            self.floor() * self.pieces_norm.get((matched, name), 0.0),
        )

    def floor(self) -> float:
        """Return what sums over that many terms can differ by, relative to their largest partial sums."""
        return floor(max(self.terms, 1), self.roundoff, self.accumulation_steps)

    def passed_on(self) -> float:
        """Return what any tensor may differ by, relative to the whole gradient: SAFETY roundings of it.

        No coarser than in float32, which low precision accumulates in: a hundred roundings of bfloat16 are 39 %.
        """
        return SAFETY * min(self.roundoff, UNIT_ROUNDOFF[torch.float32])

    def of(self, matched: int, which: Callable[[Step], dict[str, Sums]], name: str) -> float:
        """Return the largest absolute difference of one tensor over the controls."""
        worst = 0.0
        for step in self._steps(matched):
            found = which(step).get(name)
            if found is not None and found.finite:
                worst = max(worst, found.difference_norm)
        return worst

    def total(self, matched: int, which: Callable[[Step], dict[str, Sums]]) -> float:
        """Return the largest relative difference of all tensors together over the controls."""
        worst = 0.0
        for step in self._steps(matched):
            whole = overall(which(step))
            if whole.finite and math.isfinite(whole.relative):
                worst = max(worst, whole.relative)
        return worst


def overall(sums: dict[str, Sums]) -> Sums:
    """Return the sums of all tensors together."""
    total = Sums()
    for each in sums.values():
        total = total + each
    return total


def judge(
    reference: Recording, candidate: Recording, noise: Noise, *, logged: bool = True
) -> Judgement:
    """Compare a run, already measured in its hooks, with what its controls allow.

    Args:
        reference: The kept run.
        candidate: The run to judge, with its sums against the reference.
        noise: What correct code may show.
        logged: Judge the logged losses too.
    """
    result = Judgement()
    _judge_samples(reference, candidate, result)
    powers = []
    for step in candidate.steps:
        if step.matched is None:
            continue
        matched = step.matched
        if reference.steps[matched].skipped != step.skipped:
            result.findings.append(Finding("samples", step.index, matched, (), 1.0, 0.0, "skipped"))
            continue
        if step.none_mismatch:
            names = tuple(step.none_mismatch)
            result.findings.append(Finding("none", step.index, matched, names, 1.0, 0.0))
        powers.append(max(SAFETY * noise.total(matched, _gradients), noise.floor()))
        before = len(result.findings)
        _judge_gradients(step, noise, result, "gradients", _gradients)
        if step.applied is not step.gradients and len(result.findings) == before:
            _judge_gradients(step, noise, result, "applied", _applied)
        if len(result.findings) == before:
            _judge_updates(reference, step, noise, result)
        _judge_plain(step, noise, result, "buffers", _buffers)
        _judge_plain(step, noise, result, "shadows", _shadows)
        _judge_rates(reference.steps[matched], step, result)
    if logged:
        _judge_logged(reference, candidate, noise, result)
    result.power = max(powers, default=math.inf)
    return result


def _gradients(step: Step) -> dict[str, Sums]:
    return step.gradients


def _applied(step: Step) -> dict[str, Sums]:
    return step.applied


def _buffers(step: Step) -> dict[str, Sums]:
    return step.buffers


def _shadows(step: Step) -> dict[str, Sums]:
    return step.shadows


def _judge_samples(reference: Recording, candidate: Recording, result: Judgement) -> None:
    matched = {step.matched for step in candidate.steps if step.matched is not None}
    for step in candidate.steps:
        if step.matched is None:
            result.findings.append(Finding("samples", step.index, -1, (), 1.0, 0.0, "extra"))
        if step.missing:
            result.findings.append(Finding("samples", step.index, -1, (), 1.0, 0.0, "missing"))
    for step in reference.steps:
        if step.index not in matched:
            result.findings.append(Finding("samples", -1, step.index, (), 1.0, 0.0, "missing"))


def _judge_gradients(
    step: Step, noise: Noise, result: Judgement, kind: str, which: Callable[[Step], dict[str, Sums]]
) -> None:
    sums = which(step)
    matched = step.matched
    assert matched is not None
    whole = overall(sums)
    size = whole.reference_norm if whole.finite else math.nan
    floor = noise.floor()
    zero = result.zero.setdefault(matched, set())
    beyond: list[tuple[float, float, str]] = []
    for name, each in sums.items():
        result.compared += 1
        if not each.finite:
            beyond.append((math.inf, 0.0, name))
            continue
        # Rounding noise around zero: both sides within what sums of gradients of this size can leave behind.
        # A tensor of that size beside the whole gradient could not be told from it in any way.
        if (
            max(each.reference_norm, each.candidate_norm) <= floor * size
            and each.reference_norm < floor * size
        ):
            zero.add(name)
            continue
        # Backward passes rounding on from tensor to tensor: what cancels on its way to a small gradient leaves the
        # rounding of the large ones behind (a normalization of two values, whose gradient is zero but for its eps).
        limit = max(
            noise.limit(matched, which, name, each.reference_norm), noise.passed_on() * size
        )
        if each.difference_norm > limit:
            beyond.append((each.relative, limit / each.reference_norm if each.rr else 0.0, name))
        elif each.difference_norm:
            result.margin = min(result.margin, limit / each.difference_norm)
    limit = max(SAFETY * noise.total(matched, which), floor)
    if whole.finite and whole.rr and whole.relative > limit and not beyond:
        beyond.append((whole.relative, limit, ""))
    if beyond:
        beyond.sort(key=lambda item: -item[0])
        names = tuple(name for _, _, name in beyond if name)
        relative = whole.relative if whole.finite else math.inf
        result.findings.append(
            Finding(kind, step.index, matched, names, relative, max(b[1] for b in beyond))
        )


def update_limit(
    reference: Recording, noise: Noise, matched: int, kind: str, name: str, sums: Sums
) -> float:
    """Return the absolute difference that a parameter or an entry of optimizer state may show after a step."""
    size = sums.reference_norm
    moved = reference.kept[matched].moved.get(name, size) if kind == "parameters" else size
    return max(
        SAFETY * noise.of(matched, lambda step: getattr(step, kind), name),
        noise.floor() * size,
        UPDATE_NOISE * moved,
    )


def _judge_updates(reference: Recording, step: Step, noise: Noise, result: Judgement) -> None:
    """Judge parameters and optimizer state, given gradients that agree."""
    assert step.matched is not None
    kept = reference.kept[step.matched]
    for kind, sums in (("parameters", step.parameters), ("state", step.state)):
        beyond = []
        for name, each in sums.items():
            result.compared += 1
            if not each.finite:
                beyond.append((math.inf, 0.0, name))
                continue
            limit = update_limit(reference, noise, step.matched, kind, name, each)
            if each.difference_norm > limit:
                moved = kept.moved.get(name, 0.0) or each.reference_norm or 1.0
                beyond.append((each.difference_norm / moved, limit / moved, name))
        if beyond:
            beyond.sort(key=lambda item: -item[0])
            names = tuple(name for *_, name in beyond)
            result.findings.append(
                Finding(kind, step.index, step.matched, names, beyond[0][0], beyond[0][1])
            )


def _judge_plain(
    step: Step, noise: Noise, result: Judgement, kind: str, which: Callable[[Step], dict[str, Sums]]
) -> None:
    assert step.matched is not None
    sums = which(step)
    size = overall(sums).reference_norm if overall(sums).finite else 0.0
    beyond = []
    for name, each in sums.items():
        result.compared += 1
        limit = max(
            SAFETY * noise.of(step.matched, which, name),
            noise.floor() * each.reference_norm,
            _ROUNDOFF * noise.floor() * size,
        )
        if not each.finite or each.difference_norm > limit:
            beyond.append((each.relative, limit / each.reference_norm if each.rr else 0.0, name))
    if beyond:
        beyond.sort(key=lambda item: -item[0])
        names = tuple(name for *_, name in beyond)
        result.findings.append(
            Finding(kind, step.index, step.matched, names, beyond[0][0], beyond[0][1])
        )


def _judge_rates(reference: Step, step: Step, result: Judgement) -> None:
    limit = SAFETY * gamma(8, _ROUNDOFF)
    worst = rate_difference(reference, step)
    if worst > limit:
        result.findings.append(
            Finding("learning_rates", step.index, reference.index, (), worst, limit)
        )


def rate_difference(reference: Step, step: Step) -> float:
    """Return the largest relative difference of a learning rate."""
    if len(reference.learning_rates) != len(step.learning_rates):
        return math.inf
    worst = 0.0
    for a, b in zip(reference.learning_rates, step.learning_rates, strict=True):
        if a != b:
            worst = max(worst, abs(a - b) / abs(a) if a else math.inf)
    return worst


def _judge_logged(
    reference: Recording, candidate: Recording, noise: Noise, result: Judgement
) -> None:
    relative = logged_difference(reference, candidate)
    if relative is None:
        return
    control = max(
        (logged_difference(reference, each) or 0.0 for each in noise.controls), default=0.0
    )
    limit = max(SAFETY * control, noise.floor())
    if not relative <= limit:
        one_sided = not_finite(reference.logged, whole_log(reference, candidate))
        detail = one_sided or ""
        result.findings.append(Finding("logged", -1, -1, (), relative, limit, detail))


def logged_difference(reference: Recording, candidate: Recording) -> float | None:
    """Return the largest difference of a logged loss, relative to the largest loss; None where none can be compared."""
    return _log_difference(reference, whole_log(reference, candidate))


def whole_log(reference: Recording, candidate: Recording) -> list[float] | None:
    """Return what the accumulated run logs of whole batches: with ranks, the closest of what they may mean."""
    if not candidate.ranks:
        return candidate.logged
    known = [
        (found, logged)
        for logged in _logs_of_ranks(candidate)
        if (found := _log_difference(reference, logged)) is not None
    ]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def _logs_of_ranks(candidate: Recording) -> list[list[float] | None]:
    """Return what the logs of several ranks say of the whole batch.

    A rank may log the loss of all ranks, or that of its own share: the truth about what it saw. Its share's loss is a
    mean over its samples, so that the mean over ranks, each as heavy as its samples or all alike, is the whole's.
    Where rank 0 alone logs, and logs the roots of its backwards, the others would have logged theirs.
    """
    found: list[list[float] | None] = [candidate.logged]
    logs = [each.logged for each in candidate.ranks]
    if all(each is None for each in logs[1:]) and _logs_its_roots(candidate.ranks[0]):
        logs = [_roots(each) for each in candidate.ranks]
    if any(each is None for each in logs) or len({len(each or ()) for each in logs}) > 1:
        return found
    series = [each for each in logs if each is not None]
    found.append([sum(values) / len(values) for values in zip(*series, strict=True)])
    sizes = [
        [len(step.samples) for step in each.steps][: len(series[0])] for each in candidate.ranks
    ]
    if all(len(each) == len(series[0]) for each in sizes):
        weighted = []
        for values, counts in zip(zip(*series, strict=True), zip(*sizes, strict=True), strict=True):
            total = sum(counts) or 1
            weighted.append(sum(v * n for v, n in zip(values, counts, strict=True)) / total)
        found.append(weighted)
    return found


def _roots(recording: Recording) -> list[float]:
    """Return, per optimizer step, what its backwards started from, added up."""
    return [
        sum(each.loss for each in recording.backwards[step.first_backward : step.backwards])
        for step in recording.steps
    ]


def _logs_its_roots(recording: Recording) -> bool:
    roots, logged = _roots(recording), recording.logged
    return (
        logged is not None
        and len(logged) == len(roots)
        and all(math.isclose(a, b) for a, b in zip(logged, roots, strict=True))
    )


def _log_difference(reference: Recording, b: list[float] | None) -> float | None:
    a = reference.logged
    cycles = len({step.samples for step in reference.steps})
    if a is None or b is None or len(a) != len(b) or len(a) != cycles:
        return None
    pairs = finite_pairs(a, b)
    if not_finite(a, b) is not None:
        return math.inf
    size = max((abs(x) for x, _ in pairs), default=0.0)
    if not size:
        return math.inf if any(y for _, y in pairs) else 0.0
    return max(abs(x - y) for x, y in pairs) / size


def finite_pairs(a: Sequence[float], b: Sequence[float]) -> list[tuple[float, float]]:
    """Return the logged losses of two runs where both are finite."""
    return [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]


def not_finite(a: Sequence[float] | None, b: Sequence[float] | None) -> str | None:
    """Return which logged loss is inf or nan in one of two runs only, the full batch's and the accumulated; else None.

    What is not finite in both is no difference: there is nothing to compare.
    """
    for index, (x, y) in enumerate(zip(a or (), b or (), strict=False)):
        if math.isfinite(x) != math.isfinite(y):
            where = " in the full batch" if math.isfinite(y) else ""
            return f"logged loss of optimizer_step {index} is not finite{where}"
    return None


def not_finite_in_both(a: Sequence[float] | None, b: Sequence[float] | None) -> str | None:
    """Return which logged losses are inf or nan in both runs, or None."""
    pairs = list(zip(a or (), b or (), strict=False))
    found = [i for i, (x, y) in enumerate(pairs) if not (math.isfinite(x) or math.isfinite(y))]
    if not found:
        return None
    more = f", as are {len(found) - 1} more" if len(found) > 1 else ""
    return f"logged loss of optimizer_step {found[0]} is not finite in both runs{more}"


def unfit(control: Recording, reference: Recording, terms: int, roundoff: float) -> float | None:
    """Return how far a control is off if that is more than rounding; None if it is fit.

    Gradients and learning rates of every step count, and logged losses.
    """
    limit = UNFIT * max(roundoff, floor(max(terms, 1), roundoff) / SAFETY / 16)
    worst = 0.0
    for step in control.steps:
        if step.matched is None:
            return math.inf
        whole = overall(step.gradients)
        if not whole.finite:
            return math.inf
        if whole.rr or whole.dd:
            worst = max(worst, whole.relative)
    if len(control.steps) != len(reference.steps):
        return math.inf
    worst = max(worst, logged_difference(reference, control) or 0.0)
    return worst if worst > limit else None


def roundoff_of(lowered: Iterable[str]) -> float:
    """Return the unit roundoff of the lowest precision in a list of dtype names; float64's for an empty one."""
    by_name = {str(dtype).removeprefix("torch."): value for dtype, value in UNIT_ROUNDOFF.items()}
    return max((by_name.get(name, _ROUNDOFF) for name in lowered), default=_ROUNDOFF)
