"""What one run did: optimizer steps with what they consumed, and the timeline of events.

K micro-batches per cycle. `backwards` in an event or a step counts the root backwards that came
before it: with the schedule of the run that number alone says whether the event happened inside a
cycle or at its end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch

from equivcheck.differences import Sums
from equivcheck.feed import Key


@dataclass(frozen=True)
class Event:
    """One call that was seen, in order.

    Attributes:
        kind: fetch, backward, repeat (a closure evaluated again), zero_grad, cleared, edited,
            rescaled, unscale, clip, step, skipped, scheduler, scaler.
        backwards: Root backwards that had run before it.
        fetches: Micro-batches that had been handed out before it.
        detail: Scalars that belong to it.
    """

    kind: str
    backwards: int
    fetches: int
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> dict[str, Any]:
        """The detail for a reader: without what only tells detectors kinds of edits apart."""
        return {name: value for name, value in self.detail.items() if name not in _FOR_DETECTORS}


_FOR_DETECTORS = frozenset({"shrunk", "along"})


@dataclass(frozen=True)
class Collective:
    """One collective that a rank issued.

    Attributes:
        kind: all_reduce, broadcast, all_gather, ...
        bytes: Size of its input on this rank.
        group: Name of the process group.
        at: When, as of `time.time_ns`.
    """

    kind: str
    bytes: int
    group: str
    at: int


@dataclass(frozen=True)
class Place:
    """Where a backward stands: micro-step `micro_step` of `micro_steps` in cycle `cycle`.

    Attributes:
        last: No other backward of the cycle follows, in this sweep over it.
        inner: It makes gradients for a step of its own (`autograd.grad`), beside others that add to `.grad`: of a task
            that a model is adapted to, before its loss is taken.
    """

    cycle: int
    micro_step: int
    micro_steps: int
    last: bool
    inner: bool = False


@dataclass
class Step:
    """One call of an optimizer's `step`, as it was seen.

    Attributes:
        optimizer: Stable name of the optimizer: its class and its first parameter.
        samples: Keys consumed since this optimizer's previous step.
        backwards: Root backwards that had run before it, over the whole run.
        first_backward: The same count at this optimizer's previous step.
        matched: Index of the reference's step that consumed the same samples; None if there is
            none.
        learning_rates: One per parameter group.
        missing: Reference steps that were passed over before this one.
        norm: L2 norm of the gradients before the last clip, unscaled, over this optimizer's parameters.
        clipped: Whether a clip came before the step.
        skipped: A scaler left the step out.
        handed_over: The gradients are not those that backwards accumulated, but the loop's own.
        finite: Whether every gradient is.
        sample: Sampled gradient coordinates before the clip, float64, per parameter; None where
            there is no gradient.
        gradients, applied: Sums against the reference, per tensor: before the last clip, and as the
            optimizer takes them.
        parameters, state, buffers, shadows: The same, after the step.
        none_mismatch: Parameters with a gradient in one of the two runs only, and entries of the
            optimizer state that the reference alone has.
        masked: Per parameter, how many elements were left out because their gradient is noise.
        objective: Sums of this step's gradient against the stated objective's, per parameter.
        contributions: Per backward, what it added at the sampled coordinates, float64.
        left: The gradients as the last backward left them, at the sampled coordinates, float64.
        parts: With ranks, which part of a tensor this rank holds, for those that it does not hold whole.
        at: When the step ended, as of `time.time_ns`.
    """

    index: int
    optimizer: str
    samples: frozenset[Key]
    backwards: int
    first_backward: int
    learning_rates: list[float]
    matched: int | None = None
    missing: int = 0
    norm: float = 0.0
    clipped: bool = False
    skipped: bool = False
    handed_over: bool = False
    finite: bool = True
    sample: Mapping[str, torch.Tensor | None] = field(default_factory=dict)
    gradients: dict[str, Sums] = field(default_factory=dict)
    applied: dict[str, Sums] = field(default_factory=dict)
    parameters: dict[str, Sums] = field(default_factory=dict)
    state: dict[str, Sums] = field(default_factory=dict)
    buffers: dict[str, Sums] = field(default_factory=dict)
    shadows: dict[str, Sums] = field(default_factory=dict)
    none_mismatch: list[str] = field(default_factory=list)
    masked: dict[str, int] = field(default_factory=dict)
    objective: dict[str, Sums] | None = None
    contributions: list[dict[str, torch.Tensor]] = field(default_factory=list)
    left: dict[str, torch.Tensor | None] = field(default_factory=dict)
    parts: dict[str, Hashable] = field(default_factory=dict)
    at: int = 0


@dataclass
class Kept:
    """What the reference keeps of one step, for the other roles to be compared with and set to.

    Attributes:
        gradients, applied: As in Step, whole; None where there is none.
        after, buffers, state: Parameters, buffers and optimizer state after the step.
        shadows: Copies of the weights that the loop keeps itself, before the step.
        moved: How far the step moved each parameter, L2.
        begins: Parameters that the loop changed itself between the step and the next micro-batch it took.
        release: Gives the memory of what lies on disk back, at once or when enough bytes have been read.
    """

    gradients: dict[str, torch.Tensor | None]
    applied: dict[str, torch.Tensor | None]
    after: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    state: dict[str, dict[str, Any]]
    shadows: dict[str, torch.Tensor]
    moved: dict[str, float] = field(default_factory=dict)
    begins: dict[str, torch.Tensor] = field(default_factory=dict)
    release: Callable[..., None] = lambda _=None: None


@dataclass(frozen=True)
class Reduction:
    """How one number was made of many.

    Attributes:
        kind: mean or sum.
        factor: The number that it was multiplied with since.
        terms: How many there were; of a mean of weighted targets, the sum of their weights.
    """

    kind: str
    factor: float
    terms: float

    @property
    def scale(self) -> float:
        """What each term is multiplied with."""
        return self.factor / self.terms if self.kind == "mean" and self.terms else self.factor


@dataclass
class Backward:
    """One root backward.

    Attributes:
        index: Place among the root backwards of the run, from 0.
        fetches: Micro-batches that had been handed out before it.
        loss: Value of the root, without the loss scale.
        loss_scale: What a scaler had multiplied the loss with.
        root: Name of the root's grad_fn.
        root_scalar: The number that the loss was multiplied with last, by hand; 1 if it was not.
        owner: Micro-batch that a forward had used last; -1 where that is unknown.
        at: When it began, as of `time.time_ns`.
        addends: How many addends the root is a sum of; 1 if it is no sum, 0 where that is unknown.
        reduction: How the loss was made of its terms; None where that is not seen.
        adds: Whether it added to `.grad`; else its gradients were returned.
    """

    index: int
    fetches: int
    loss: float
    loss_scale: float
    root: str
    root_scalar: float = 1.0
    owner: int = -1
    at: int = 0
    addends: int = 0
    reduction: Reduction | None = None
    adds: bool = False


@dataclass
class Recording:
    """Everything that was seen of one run.

    Attributes:
        role: As in DESIGN: reference, control, candidate, ...
        fetched: Keys of the samples of every micro-batch (or sample) handed out, in order.
        own_length: Rows of the data set that the loop made of all samples; None if it made none.
        logged: What `train` returned or yielded, one number per optimizer step; None if nothing.
        schedulers: Class and plain arguments of every scheduler that was made.
        prefetched: Micro-batches that were handed out before they were used, at most; 0 if none.
        boundaries: Per optimizer step, the micro-batches that it used up.
        uses: Micro-batches in the order in which forwards took them.
        optimizers: Parameter names by optimizer.
        kept, initial: What the reference keeps: of each step, and of the state before the first.
        lowered: Operators that computed below float64, and in what dtype.
        asked: Coarsest dtype that the code cast to, in a promoted run ("" if none).
        dropout: Whether a dropout was switched off.
        random_drawn: Whether a global random generator advanced.
        unseeded: Whether a generator was seeded by the operating system.
        parameters: Number of elements of all parameters.
        dtype, autocast: Coarsest dtype of the trained parameters, and of autocast ("" if none).
        seconds: Wall time.
        ranks: What each rank saw, where several ran; this recording is then what they did together.
        collectives: What this rank sent, in order.
    """

    role: str
    steps: list[Step] = field(default_factory=list)
    timeline: list[Event] = field(default_factory=list)
    backwards: list[Backward] = field(default_factory=list)
    fetched: list[list[Key]] = field(default_factory=list)
    own_length: int | None = None
    logged: list[float] | None = None
    schedulers: list[dict[str, Any]] = field(default_factory=list)
    prefetched: int = 0
    boundaries: list[list[int]] = field(default_factory=list)
    uses: list[int] = field(default_factory=list)
    optimizers: dict[str, list[str]] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    initial: Kept | None = None
    lowered: dict[str, str] = field(default_factory=dict)
    asked: str = ""
    dropout: bool = False
    random_drawn: bool = False
    unseeded: bool = False
    parameters: int = 0
    dtype: str = "float32"
    autocast: str = ""
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    ranks: list[Recording] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)

    def join_samples(self) -> None:
        """Make micro-batches of samples that were handed out one by one: those between two backwards are one's.

        Nothing is joined where all were taken before the first backward, as into a tensor of the loop's own.
        """
        ends = sorted({backward.fetches for backward in self.backwards})
        if not ends or len(ends) < len(self.steps):
            return

        def joined(fetches: int) -> int:
            return bisect_right(ends, fetches - 1) + 1 if fetches else 0

        whole: list[list[Key]] = [[] for _ in range(joined(len(self.fetched)))]
        for index, keys in enumerate(self.fetched):
            whole[joined(index + 1) - 1] += keys
        timeline: list[Event] = []
        for event in self.timeline:
            fetches, detail = joined(event.fetches), event.detail
            if event.kind == "fetch":
                if any(each.kind == "fetch" and each.fetches == fetches for each in timeline[-1:]):
                    continue
                detail = {**detail, "samples": len(whole[fetches - 1])}
            timeline.append(replace(event, fetches=fetches, detail=detail))
        for backward in self.backwards:
            backward.fetches = joined(backward.fetches)
            backward.owner = joined(backward.owner + 1) - 1
        self.uses = [use for use, _ in groupby(joined(each + 1) - 1 for each in self.uses)]
        self.fetched, self.timeline = whole, timeline

    def places(self, cycles: dict[Key, int]) -> list[Place]:
        """Return the place of every backward, given the cycle that each sample belongs to.

        A loop may fetch each micro-batch just before its backward, or all of a cycle up front. In
        the second case there are as many backwards (or a multiple) as fetches, and they pair up in
        order.
        """
        by_cycle: dict[int, list[int]] = {}
        for index, keys in enumerate(self.fetched):
            by_cycle.setdefault(cycles.get(keys[0], -1), []).append(index)
        order = sorted(by_cycle, key=lambda cycle: by_cycle[cycle][0])
        position = {
            fetch: (cycle, by_cycle[cycle].index(fetch))
            for cycle in order
            for fetch in by_cycle[cycle]
        }
        in_order = self.prefetched and not self.uses
        owner = [
            position.get(backward.index if in_order else _owner(backward), (-1, 0))
            for backward in self.backwards
        ]
        for cycle in order:
            members = [i for i, (c, _) in enumerate(owner) if c == cycle]
            count = len(by_cycle[cycle])
            fetched_last = {owner[i][1] for i in members}
            # All were fetched, or went forward, before the first backward: the last of them is no backward's own.
            if fetched_last == {count - 1} and count > 1 and len(members) % count == 0:
                share = len(members) // count
                sweeps = self._sweeps(members, count)
                for rank, i in enumerate(members):
                    owner[i] = (cycle, rank % count if sweeps else rank // share)
        places = []
        adds = any(backward.adds for backward in self.backwards)
        for i, (cycle, micro_step) in enumerate(owner):
            # The last of a sweep: the next backward is another cycle's, or begins this one anew.
            last = i + 1 == len(owner) or owner[i + 1][0] != cycle or owner[i + 1][1] < micro_step
            inner = adds and not self.backwards[i].adds
            places.append(Place(cycle, micro_step, len(by_cycle.get(cycle, [0])), last, inner))
        return places

    def _sweeps(self, members: list[int], count: int) -> bool:
        """Return whether a cycle's backwards go through its micro-batches several times, not several at each.

        Another root begins a new sweep, or something was done with the gradients of the one before.
        """
        if len(members) == count:
            return False
        roots = [self.backwards[i].root for i in members]
        if len(set(roots[:count])) == 1 and roots[count] != roots[0]:
            return True
        ends = {members[j] for j in range(count, len(members), count)}
        kinds = {"step", "skipped", "zero_grad", "cleared", "parameters_changed"}
        between = {
            event.backwards
            for event in self.timeline
            if event.kind in kinds and members[0] < event.backwards <= members[-1]
        }
        return bool(ends & between) and between <= ends


def closes(places: Sequence[Place], index: int) -> bool:
    """Return whether a backward is of the last micro-step of its sweep: what follows there the full batch has too."""
    end = next((each for each in places[index:] if each.last), places[index])
    return end.micro_step == places[index].micro_step


def _owner(backward: Backward) -> int:
    """Return the micro-batch that a backward belongs to: the one used last, or else fetched last."""
    return backward.owner if backward.owner >= 0 else backward.fetches - 1
