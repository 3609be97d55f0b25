"""The experiment: the runs that decide one case, each made when it is first asked for.

| role | batching | arithmetic |
| --- | --- | --- |
| reference | full batch | float64 |
| control | full batch, permuted or perturbed | float64 |
| candidate | accumulated | float64 |
| native_reference, native_candidate | full batch, accumulated | as written |
| pieces | every micro-batch alone, from the state its cycle starts from | float64 |

What is under test says how they are made: a subject (`subject_experiment`), two command lines (`scripts.experiment`),
two recordings (`scripts.recorded`). What follows from them is the same for all, and is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from equivcheck.case import Case
from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.feed import Data, Key
from equivcheck.fit import Attribution
from equivcheck.interventions import Copies, Intervention
from equivcheck.recording import Place, Recording, Step
from equivcheck.settled import judged_as_left, sends_after_steps
from equivcheck.verdict import Judgement, Noise, judge, roundoff_of, unfit

if TYPE_CHECKING:
    from equivcheck.ranks.crew import Crew

# What rounding may become in code of condition 1e12, beyond which float64 itself decides nothing: a difference below it
# is worth a run with perturbed parameters.
CLOSE = 1e-4

Interventions = tuple[Intervention, ...]
# The gradient of every addend of the loss, by cycle and micro-step.
ByPlace = dict[tuple[int, int], dict[tuple[int, tuple[int, ...]], dict[str, torch.Tensor]]]
T = TypeVar("T")


class UnderTest(Protocol):
    """What an experiment runs."""

    @property
    def target(self) -> str:
        """What a result calls it."""

    @property
    def repeatable(self) -> bool:
        """Whether it starts anew in every run."""

    @property
    def trained_nothing(self) -> tuple[str, str]:
        """Why no backward may have been seen, and what to do then."""


class Experiment(ABC):
    """Runs one case, role by role, and remembers what was run.

    Args:
        subject: What is under test.
        case: The point of the matrix.
        progress: Told the role that begins.
        promoted: Judge in float64; otherwise every role computes as written.

    Attributes:
        reseeds_forwards: Another seed changes what forwards draw, and nothing before them.
        intervenes: Runs can be made with something put right.
        trials: As many of them are worth making.
        other_steps: The code can be run at another K.
        together: A piece is what all ranks compute in one micro-step: rows interact across ranks.
        crew: The ranks, where this process starts them.
        wants: Arguments that the user's code asks for by name.
        has_objective: The user states what the loop minimises.
        notes: What a reader of the result has to know.
        runs: Role and seconds of every run made.
        remembered: What detectors keep from one question to the next.
    """

    reseeds_forwards = False
    intervenes = True
    trials = 60
    other_steps = True
    together = False
    crew: Crew | None = None
    has_objective = False

    def __init__(
        self,
        subject: UnderTest,
        case: Case,
        progress: Callable[[str], None] = lambda _: None,
        *,
        promoted: bool = True,
    ) -> None:
        self.is_promoted = promoted
        self.subject = subject
        self.case = case
        self.wants: set[str] = set()
        self.notes: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self.remembered: dict[Any, Any] = {}
        self._progress = progress
        self._cache: dict[Any, Any] = {}

    @abstractmethod
    def close(self) -> None:
        """Remove what was kept on disk, and end what was started."""

    # ---- how the case is cut ---------------------------------------------------------------------

    @property
    @abstractmethod
    def data(self) -> Data:
        """The full batches."""

    @abstractmethod
    def data_for(self, interventions: Interventions, *, promoted: bool) -> Data:
        """Return the data of a run."""

    @abstractmethod
    def micro_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-batch."""

    @abstractmethod
    def counts(self, accumulation_steps: int | None) -> dict[str, list[list[float]]]:
        """Return what each micro-batch holds of what may be counted, by label; per cycle."""

    @abstractmethod
    def terms(self) -> int:
        """Return the length of the longest sum behind a gradient: rows times the length of a row."""

    # ---- roles ---------------------------------------------------------------------------------

    @abstractmethod
    def reference(self, interventions: Interventions = ()) -> Recording:
        """Return the full-batch run in float64."""

    @abstractmethod
    def reference_of_length(self, length: int) -> Recording:
        """Return the full-batch run whose `len(loader)` says something else."""

    @abstractmethod
    def reference_of_horizon(self, steps: int) -> Recording:
        """Return the full-batch run that is told another number of optimizer steps, by its loader too."""

    @abstractmethod
    def altered_reference(self, interventions: Interventions) -> Recording:
        """Return the full-batch run with something put right, compared with the one as written."""

    @abstractmethod
    def control(self, which: int = 0, *, seed_offset: int = 0, permuted: bool = True) -> Recording:
        """Return the full-batch run with its blocks of rows permuted."""

    @abstractmethod
    def perturbed(self) -> Recording:
        """Return the full-batch run with parameters that are off by one rounding."""

    @abstractmethod
    def candidate(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64."""

    @abstractmethod
    def native(self, role: str) -> Recording:
        """Return native_reference or native_candidate: as written, from the reference's states."""

    @abstractmethod
    def pieces_recording(self, interventions: Interventions = ()) -> Recording:
        """Return the run that took the pieces."""

    @abstractmethod
    def attributions(self, interventions: Interventions = ()) -> list[Attribution]:
        """Return the weights of every matched step whose micro-batches were all seen alone."""

    # ---- what not every kind of experiment can run ---------------------------------------------

    def reseeded_within(self) -> Recording:
        """Return the full-batch run with other seeds from the first micro-batch on."""
        raise _cannot("with other seeds in its steps alone")

    def other(self, accumulation_steps: int) -> Experiment:
        """Return the experiment at another K, which has the full batch in common."""
        raise _cannot(f"with K = {accumulation_steps}")

    def at(self, accumulation_steps: int) -> Recording:
        """Return the accumulated run with another K."""
        return self.other(accumulation_steps).candidate()

    def candidate_again(self) -> Recording:
        """Return the accumulated run once more: state that survived from earlier runs makes it differ."""
        raise _cannot("once more")

    def contributed(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64 once more, with what each backward added."""
        raise _cannot(f"with what each backward adds, {len(interventions)} things put right")

    def contributed_whole(self) -> Recording:
        """Return the full-batch run once more, with what each backward added."""
        raise _cannot("with what each backward of the full batch adds")

    def turned(self, by: int) -> Recording:
        """Return the accumulated run with the first `by` micro-batches of every cycle moved to its end.

        Same samples in every cycle, and what each backward added.
        """
        raise _cannot(f"with the micro-batches of every cycle turned by {by}")

    def copies_moved(self) -> dict[str, Copies]:
        """Return when, and how far, the loop moves its copies of the weights: in three runs left to themselves.

        The full batches, the accumulated run, and the micro-batches each with a step of its own.
        """
        raise _cannot("left to itself")

    def left_by_backward(self) -> Recording:
        """Return native_candidate once more, with the gradients as each cycle's last backward left them."""
        raise _cannot("with what each cycle's last backward leaves")

    def left_on_ranks(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64 once more, with what each rank's last backward of a cycle left."""
        raise _cannot(f"with what each rank leaves, {len(interventions)} things put right")

    def settled(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run left to itself, its parameters compared once the loop is done with a step."""
        raise _cannot(f"left to itself, {len(interventions)} things put right")

    def left_by_full_batch(self) -> Recording:
        """Return the full-batch run once more, with what its backwards left."""
        raise _cannot("with what the full batch leaves")

    def alone_of_length(self, length: int) -> Recording:
        """Return the run that steps after every micro-batch, told that the loader has another length."""
        raise _cannot(f"with a loader of {length} micro-batches, each with a step of its own")

    def full_batch_alone(self, index: int) -> Recording:
        """Return the run of one full batch, from the state that its step starts from: without what the loop keeps."""
        raise _cannot(f"with full batch {index} alone")

    def begun_with(self, micro_step: int) -> list[Step]:
        """Return the first steps, of every optimizer, of a run that is given one micro-batch of the first cycle."""
        raise _cannot(f"that begins with micro-batch {micro_step}")

    # ---- what the kinds answer in their own way ------------------------------------------------

    @property
    def has_native(self) -> bool:
        """Whether runs in the arithmetic as written stand beside those in float64."""
        return self.is_promoted

    def again(
        self,
        progress: Callable[[str], None] = lambda _: None,
        *,
        promoted: bool,
        optimizer_steps: int | None = None,
    ) -> Experiment:
        """Return a new experiment on the same case, or on so many of its optimizer steps."""
        case = replace(self.case, optimizer_steps=optimizer_steps or self.case.optimizer_steps)
        make = cast("Callable[..., Experiment]", type(self))
        return make(self.subject, case, progress, promoted=promoted)

    @abstractmethod
    def limit(self, seconds: float | None) -> None:
        """Take note that so many seconds are left from now."""

    def estimate(self) -> dict[str, Any]:
        """Return what the case is expected to need, before it runs."""
        return {"parameters": 0, "bytes": 0, "disk_bytes": 0, "seconds": 0.0}

    def facts(self) -> dict[str, Any]:
        """Return entries of the result's case that only the runs have shown."""
        return {}

    def other_samples(self) -> dict[str, Any] | None:
        """Return how the samples of the two runs differ, where samples are recognised by what they hold."""
        return None

    def printed(self) -> dict[str, Any] | None:
        """Return how a loss that both runs show differs, where what they show is not what they return."""
        return None

    def addends_alone(self, alone: ByPlace, _whole: ByPlace) -> ByPlace:
        """Return the addends of the micro-batches alone: as the run that took the pieces has them."""
        return alone

    # ---- what follows from the runs ------------------------------------------------------------

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

    def cycles(self, interventions: Interventions = ()) -> dict[Key, int]:
        """Return, for every sample, the first reference step that consumed it."""
        found: dict[Key, int] = {}
        for step in self.reference(interventions).steps:
            for key in step.samples:
                found.setdefault(key, step.index)
        return found

    def cycle_of(self, step: Step, cycles: Mapping[Key, int]) -> int:
        """Return the cycle of a reference step: two optimizers may share the samples of one. -1 if it has none."""
        return min((cycles[key] for key in step.samples if key in cycles), default=-1)

    def schedule(self, interventions: Interventions = ()) -> list[Place]:
        """Return the place of every backward of the candidate as written: without the tail, if that is left out."""
        cut = without_tail(interventions)
        return self.candidate(cut).places(self.cycles(cut))

    def schedule_for(self, interventions: Interventions) -> list[Place]:
        """Return the places that a run with these things put right is told: none where only its data are others."""
        return [] if without_tail(interventions) == interventions else self.schedule(interventions)

    def noise(self) -> Noise:
        """Return what the controls so far measured."""
        if ("noise",) not in self._cache:
            lowered = [*self.reference().lowered.values(), *self.candidate().lowered.values()]
            if not self.is_promoted:
                lowered += [self.reference().dtype, self.reference().autocast]
            roundoff = roundoff_of(lowered)
            self._cache["noise",] = Noise(
                self.terms(), [self.control()], roundoff, self.case.accumulation_steps
            )
        return self._cache["noise",]  # type: ignore[no-any-return]

    def judgement(self, interventions: Interventions = (), *, logged: bool = True) -> Judgement:
        """Judge the accumulated run; a close call is settled by another permutation and the size of the pieces."""
        reference, candidate = self.reference(interventions), self.candidate(interventions)
        result = judge(reference, candidate, self.noise(), logged=logged)
        if not result.same and self._close(result):
            self.settle()
            result = judge(reference, candidate, self.noise(), logged=logged)
        if result.kinds() & {"gradients", "applied"} and sends_after_steps(candidate.ranks):
            # Ranks that step each with its own gradient may average the parameters afterwards.
            try:
                left = self.settled(interventions)
            except EquivcheckError:
                return result
            return judged_as_left(result, reference, left, self.noise())
        return result

    def _close(self, result: Judgement) -> bool:
        """Return whether any finding may be rounding, whatever the condition of the code."""
        return any(each.relative < CLOSE for each in result.findings)

    def settle(self) -> None:
        """Measure the noise once more: other permutations, and what the pieces cancel."""
        noise = self.noise()
        if noise.pieces_norm or self.case.accumulation_steps == 1:
            return
        noise.controls = [self.control(), self.control(1), self.perturbed()]
        try:
            for attribution in self.attributions():
                begin = 0
                for name, length in attribution.names:
                    block = attribution.pieces[:, begin : begin + length]
                    whole = self.reference().kept[attribution.matched].gradients[name]
                    share = (whole.numel() / length) ** 0.5 if whole is not None and length else 1.0
                    noise.pieces_norm[attribution.matched, name] = (
                        float(block.norm(dim=1).sum()) * share
                    )
                    begin += length
        except EquivcheckError:
            self.notes.append(
                "the micro-batches could not be run alone: no weights, and a coarser noise floor"
            )

    def fit(self) -> float | None:
        """Return how far the control is off, or None if it can be relied on."""
        return unfit(self.control(), self.reference(), self.terms(), self.noise().roundoff)


def without_tail(interventions: Interventions) -> Interventions:
    """Return those interventions that leave out the last full batch: there are then fewer cycles."""
    return tuple(each for each in interventions if each.shorter)


def _cannot(what: str) -> UsageError:
    """Return the refusal of a run that this kind of experiment cannot make."""
    return UsageError(f"this run cannot be made: {what}")
