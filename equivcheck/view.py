"""What a detector looks at: one accumulated run, as written or with some things already put right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from equivcheck.attribution import Weights, predict
from equivcheck.company import attributions_in_company
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment, Interventions, without_tail
from equivcheck.fit import BEYOND_ROUNDING, Attribution
from equivcheck.noise import SAFETY
from equivcheck.recording import Event, Place, Recording, Step
from equivcheck.verdict import Judgement


@dataclass
class Suspicion:
    """A cause that would explain what was seen, and how to put it right.

    Attributes:
        code: EQnnn.
        variants: Ways to put it right, each a tuple of interventions; the first that works proves
            it.
        evidence: Numbers and places that speak for it.
        step: Optimizer step that shows it first.
        rank: Order of trial: specific signatures first.
        shared: The full batch has it too.
        proved: Proved by means of its own (a repeat, the reference); no intervention is needed.
        explains: Kinds of findings that a cause proved by its own means accounts for.
        is_guess: Nothing speaks for it but that putting it right may help: unproved it is not told.
        is_seen: The wrong calls themselves were seen, whether or not leaving them out puts all right.
    """

    code: str
    variants: Sequence[Interventions] = field(default_factory=list)
    evidence: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    rank: int = 50
    shared: bool = False
    proved: bool = False
    explains: frozenset[str] = frozenset()
    is_seen: bool = False
    is_guess: bool = False


class View:
    """One accumulated run and what follows from it, computed when asked for.

    Attributes:
        experiment: The runs of the case.
        chosen: What is put right in this run.
        steps: K, the accumulation steps of the case.
        names: The parameters that are looked at; None for all.
    """

    def __init__(self, experiment: Experiment, chosen: Interventions = ()) -> None:
        self.experiment = experiment
        self.chosen = chosen
        self.steps = experiment.case.accumulation_steps
        self.names: frozenset[str] | None = None

    @cached_property
    def reference(self) -> Recording:
        """The full-batch run."""
        return self.experiment.reference(self.chosen)

    @cached_property
    def candidate(self) -> Recording:
        """The accumulated run."""
        return self.experiment.candidate(self.chosen)

    @cached_property
    def judgement(self) -> Judgement:
        """What differs between them."""
        return self.experiment.judgement(self.chosen)

    @cached_property
    def places(self) -> list[Place]:
        """Where every backward of the accumulated run stands."""
        return self.experiment.schedule(self.chosen)

    @cached_property
    def cycles(self) -> dict[tuple[int, int], int]:
        """The reference step of every sample."""
        return self.experiment.cycles(without_tail(self.chosen))

    @cached_property
    def attributions(self) -> list[Attribution]:
        """The weights of every matched step: of micro-batches alone, or else in company."""
        key = ("attributions", self.chosen)
        known = self.experiment.remembered
        if key not in known:
            known[key] = self._attributions()
        return known[key]  # type: ignore[no-any-return]

    @property
    def every(self) -> list[Attribution]:
        """The weights of every matched step, also of those that are left aside."""
        return self.attributions

    def _attributions(self) -> list[Attribution]:
        try:
            alone = self.experiment.attributions(self.chosen)
        except EquivcheckError:
            if together := self._together([]):
                return together
            # The loop refuses micro-batches alone.
            if in_company := attributions_in_company(self.experiment, self.chosen):
                return in_company
            raise
        if alone and all(self.spans(each, reference=True) for each in alone):
            return alone
        if together := self._together(alone):
            return together
        try:
            in_company = attributions_in_company(self.experiment, self.chosen)
        except EquivcheckError:
            return alone
        if len(in_company) >= max(len(alone), 1) and all(
            self.spans(each, reference=True) for each in in_company
        ):
            return in_company
        return alone

    def _together(self, alone: list[Attribution]) -> list[Attribution]:
        """Return the weights of micro-steps that all ranks compute together, if those make what no rank's alone do.

        A norm over the rows of all ranks is not what any of them computes by itself.
        """
        experiment = self.experiment
        inside = any(within(each.w) for each in alone)
        if experiment.case.shares == 1 or experiment.together or inside:
            return []
        experiment.together = True
        try:
            found = experiment.attributions(self.chosen)
            if len(found) >= max(len(alone), 1) and all(within(each.w) for each in found):
                return found
        except EquivcheckError:
            pass
        experiment.together = False
        return []

    @cached_property
    def divergent(self) -> list[Attribution]:
        """The weights of those steps whose gradient differs."""
        bad = {
            each.step for each in self.judgement.findings if each.kind in {"gradients", "applied"}
        }
        return [each for each in self.attributions if each.step in bad]

    def inside(self, *kinds: str) -> list[tuple[Event, Place]]:
        """Return the events of some kinds that happened inside a cycle, with the backward before each.

        Of several ranks those of rank 0, and what others did that rank 0 did not.
        """
        found = _inside(self.candidate, self.places, kinds)
        known = {(event.kind, event.backwards) for event, _ in found}
        for each in self.candidate.ranks[1:]:
            own = _inside(each, each.places(self.cycles), kinds)
            other = [
                (event, place)
                for event, place in own
                if (event.kind, event.backwards) not in known
                and event.backwards <= len(self.candidate.backwards)
            ]
            known |= {(event.kind, event.backwards) for event, _ in other}
            found += other
        return found

    def restored(self, attribution: Attribution) -> list[int]:
        """Return the micro-steps of one cycle that what is put right gives with their true weight."""
        cycle = self.cycle_of(attribution.matched)
        return [k for each in self.chosen for k in each.restored.get(cycle, ())]

    def cycle_of(self, matched: int) -> int:
        """Return the cycle of a reference step: two optimizers may share the samples of one."""
        found = self.experiment.cycle_of(self.reference.steps[matched], self.cycles)
        return found if found >= 0 else matched

    def ordinal(self, step: Step) -> int:
        """Return the number of a step of the accumulated run among those of its own optimizer."""
        earlier = self.candidate.steps[: step.index]
        return sum(each.optimizer == step.optimizer for each in earlier)

    def tolerance(self, attribution: Attribution) -> float:
        """Return the relative error that a predicted gradient may have: noise of the pieces it is made of."""
        noise = self.experiment.noise()
        sizes = attribution.pieces.norm(dim=1).sum() * max(
            1.0, max((abs(x) for x in attribution.w.solution), default=1.0)
        )
        size = float(attribution.candidate.norm()) or 1.0
        base = max(noise.floor(), SAFETY * noise.total(attribution.matched, lambda s: s.gradients))
        return base * max(1.0, float(sizes) / size)

    def fits(self, attribution: Attribution, weights: Iterable[float]) -> bool:
        """Return whether these weights predict the accumulated gradient to within noise."""
        rest = attribution.candidate - predict(attribution.pieces, list(weights))
        theta = attribution.weights_piece
        if theta is not None and float(theta @ theta):
            rest = rest - theta * (float(rest @ theta) / float(theta @ theta))
        size = float(attribution.candidate.norm())
        return float(rest.norm()) <= self.tolerance(attribution) * (size or 1.0)

    def spans(self, attribution: Attribution, *, reference: bool) -> bool:
        """Return whether a gradient lies in the span of the pieces."""
        fit = attribution.v if reference else attribution.w
        return fit.residual is not None and fit.residual <= self.tolerance(attribution)

    def right(self, attribution: Attribution) -> list[float] | None:
        """Return the true weights: those of the full batch; None if they do not make it.

        More pieces than parameters are told apart by no gradient. The true weights are then those that a loss may
        have and that make the full batch's gradient.
        """
        if not self.spans(attribution, reference=True):
            return None
        return self._share(attribution) or attribution.v.solution

    def known(self, attribution: Attribution) -> bool:
        """Return whether the true weights are more than some of many that make the full batch's gradient.

        Pieces that span all gradients there are make any, also one that samples made together.
        """
        everything = attribution.v.rank >= attribution.reference.numel()
        return (
            self.told_apart(attribution) or not everything or self._share(attribution) is not None
        )

    def _share(self, attribution: Attribution) -> list[float] | None:
        """Return the weights of a loss's own that make the full batch's gradient, where pieces cannot be told apart."""
        if self.told_apart(attribution):
            return None
        limit = self.tolerance(attribution) * float(attribution.reference.norm())
        for share in self.shares(attribution):
            rest = attribution.reference - predict(attribution.pieces, share)
            if float(rest.norm()) <= limit:
                return share
        return None

    def told_apart(self, attribution: Attribution) -> bool:
        """Return whether the gradients tell the weight of every piece that has a gradient."""
        pairs = zip(attribution.v.values, attribution.pieces, strict=True)
        return all(value is not None or not bool(piece.any()) for value, piece in pairs)

    def shares(self, attribution: Attribution) -> list[list[float]]:
        """Return weights that a loss may have: in proportion to what is counted, all alike, or 1 each."""
        length = attribution.pieces.shape[0]
        found = []
        for values in self.counts().values():
            counts = values[attribution.matched % len(values)]
            total = float(sum(counts))
            if len(counts) == length and total:
                found.append([x / total for x in counts])
        return [*found, [1.0 / length] * length, [1.0] * length]

    def full_size(self, attribution: Attribution) -> bool:
        """Return whether a cycle is complete."""
        return attribution.micro_steps == self.steps

    def counts(self, accumulation_steps: int | None = None) -> dict[str, list[list[float]]]:
        """Return what each micro-batch holds of what may be counted: rows, labels, masked entries; per cycle."""
        experiment = self.experiment
        key = ("counts", accumulation_steps)
        if key not in experiment.remembered:
            experiment.remembered[key] = experiment.counts(accumulation_steps)
        return experiment.remembered[key]  # type: ignore[no-any-return]


def within(fit: Weights) -> bool:
    """Return whether a gradient lies in the span of the pieces, whatever became of rounding."""
    return fit.residual is not None and fit.residual <= BEYOND_ROUNDING


def _inside(
    recording: Recording, places: Sequence[Place], kinds: Sequence[str]
) -> list[tuple[Event, Place]]:
    found = []
    for event in recording.timeline:
        if event.kind in kinds and 0 < event.backwards <= len(places):
            place = places[event.backwards - 1]
            if not place.last:
                found.append((event, place))
    return found


class Part(View):
    """The same run, seen through some of its parameters only."""

    def __init__(self, whole: View, names: frozenset[str]) -> None:
        super().__init__(whole.experiment, whole.chosen)
        self._whole = whole
        self.names = names

    @cached_property
    def attributions(self) -> list[Attribution]:
        """The weights of every matched step, fitted over those parameters."""
        return [each.only(self.names or frozenset()) for each in self._whole.attributions]


def some_differing(view: View) -> frozenset[str]:
    """Return the parameters whose gradients differ, where others' do not; empty if all differ, or none."""
    everything = {name for each in view.divergent for name, _ in each.names}
    names = frozenset(
        name for each in view.judgement.findings if each.kind == "gradients" for name in each.names
    )
    return frozenset() if names >= everything else names


class Group(View):
    """The same run, with some of the optimizer steps that differ left aside.

    Args:
        whole: The run.
        chosen: The steps that differ and are looked at.
    """

    def __init__(self, whole: View, chosen: Sequence[Attribution]) -> None:
        super().__init__(whole.experiment, whole.chosen)
        self._whole = whole
        self._steps = {each.step for each in chosen}

    @cached_property
    def attributions(self) -> list[Attribution]:
        """The weights of those steps, and of all that do not differ."""
        aside = {each.step for each in self._whole.divergent} - self._steps
        return [each for each in self._whole.attributions if each.step not in aside]

    @property
    def every(self) -> list[Attribution]:
        """The weights of every matched step of the run."""
        return self._whole.attributions
