"""The experiment for a subject: its code is executed in this process, once for every role, or on ranks.

The control is the full batch with blocks of rows permuted; a piece is a run of its own on one micro-batch.

K micro-batches per cycle, R ranks.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from equivcheck.case import Case
from equivcheck.casting import promote_tree
from equivcheck.comparers import Comparer, Perturbed, Pieces
from equivcheck.counting import ADDED_UP, is_weight, masks
from equivcheck.cuts import Cuts, refuse_remainders, refuse_uneven
from equivcheck.errors import UsageError
from equivcheck.execute import Run, execute, seed_all
from equivcheck.experiment import Experiment, Interventions, without_tail
from equivcheck.feed import Data, Key, read_batches
from equivcheck.fit import Attribution, attribute, sampled
from equivcheck.interventions import Copies
from equivcheck.memory import estimate
from equivcheck.observe import Keeper, Observer
from equivcheck.ranks.crew import Crew
from equivcheck.ranks.merge import merged
from equivcheck.recorder import Recorder
from equivcheck.recording import Place, Recording, Step
from equivcheck.settled import Settled
from equivcheck.split import block_permutation, named_tensors, take, tensors_in
from equivcheck.subject import Subject


class SubjectExperiment(Experiment):
    """Runs one case of a subject, role by role, and remembers what was run.

    Args:
        subject: Code under test.
        case: The point of the matrix.
        progress: Told the role that begins.
        promoted: Judge in float64; otherwise every role computes as written.
    """

    def __init__(
        self,
        subject: Subject,
        case: Case,
        progress: Callable[[str], None] = lambda _: None,
        *,
        promoted: bool = True,
    ) -> None:
        super().__init__(subject, case, progress, promoted=promoted)
        self._subject = subject
        self._keepers: list[Keeper] = []
        seed_all(case.seed)  # modules may draw while they are imported
        self._code = code = subject.fresh()
        seed_all(case.seed)
        self._data = read_batches(code.batches, case.optimizer_steps, case.rows)
        self._promoted = (
            Data([promote_tree(batch) for batch in self.data.batches], self.data.rows)
            if promoted
            else self.data
        )
        self.has_objective = code.objective is not None
        self.wants = set(inspect.signature(code.train).parameters)
        self.cuts = Cuts(case, self.data.rows)
        self._check_even()
        if case.world_size > 1:
            self.crew = Crew(subject, case.world_size, case.device)

    def _check_even(self) -> None:
        refuse_uneven(self.case, self.wants, self._subject.location)
        refuse_remainders(self.case, self.wants, self.data.rows, self._subject.location)

    def close(self) -> None:
        """Remove what was kept on disk."""
        for keeper in self._keepers:
            keeper.shelf.close()
        if self.crew is not None:
            self.crew.close()

    def again(
        self,
        progress: Callable[[str], None] = lambda _: None,
        *,
        promoted: bool,
        optimizer_steps: int | None = None,
    ) -> Experiment:
        """Return a new experiment on the same case, or on so many of its optimizer steps."""
        other = super().again(progress, promoted=promoted, optimizer_steps=optimizer_steps)
        if self.crew is not None and other.crew is not None:
            other.crew.ends_at, other.crew.timeout = self.crew.ends_at, self.crew.timeout
        return other

    def limit(self, seconds: float | None) -> None:
        """Give the ranks so many seconds from now, of which they are told why they were late."""
        if self.crew is not None and seconds is not None:
            self.crew.ends_at, self.crew.timeout = time.monotonic() + seconds, seconds

    def estimate(self) -> dict[str, Any]:
        """Return what the case is expected to need, before it runs."""
        return estimate(self._code, self.data)

    # ---- how the case is cut ---------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """The full batches."""
        return self._data

    def data_for(self, interventions: Interventions, *, promoted: bool) -> Data:
        """Return the data of a run."""
        data = self._promoted if promoted else self.data
        return data.shorter() if any(each.shorter for each in interventions) else data

    def slices(
        self, data: Data, accumulation_steps: int | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return, per full batch, the first and last row of every micro-batch: of rank 0, then of rank 1 ..."""
        return self.cuts.slices(data, accumulation_steps)

    def micro_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-batch."""
        return self.cuts.micro_batches(data)

    def _alone(self, data: Data) -> list[list[int]]:
        """Return the samples of every piece: a micro-batch, or the same micro-step of all ranks together."""
        return self.cuts.micro_steps(data) if self.together else self.cuts.micro_batches(data)

    def counts(self, accumulation_steps: int | None) -> dict[str, list[list[float]]]:
        """Return what each micro-batch holds of what may be counted, by label; per cycle."""
        dealt = self._dealt()
        if dealt is not None and accumulation_steps not in {None, self.case.accumulation_steps}:
            return self.other(accumulation_steps).counts(None)
        found: dict[str, list[list[float]]] = {"rows": []}
        cuts = self.slices(self.data, accumulation_steps)
        located = [self.data.locate(sample) for sample in dealt or ()]
        for index, (batch, slices) in enumerate(zip(self.data.batches, cuts, strict=True)):
            found["rows"].append([stop - start for start, stop in slices])
            order = [row for of, row in located if of == index]
            for path, whole in named_tensors(batch):
                is_dealt = whole.dim() and len(order) == len(whole)
                tensor = whole[order] if is_dealt else whole
                for label, mask in masks(path or "batch", tensor) if tensor.dim() else ():
                    rows = mask.flatten(1).sum(1) if mask.dim() > 1 else mask
                    found.setdefault(label, []).append(
                        [int(rows[start:stop].sum()) for start, stop in slices]
                    )
                if is_weight(tensor):
                    label = f"sum of {path}" if tensor.is_floating_point() else f"{path}{ADDED_UP}"
                    found.setdefault(label, []).append(
                        [_total(tensor[start:stop]) for start, stop in slices]
                    )
        return {
            label: values for label, values in found.items() if len(values) == len(self.data.rows)
        }

    def terms(self) -> int:
        """Return the length of the longest sum behind a gradient: rows times the length of a row."""
        longest = 1
        for batch in self.data.batches:
            for tensor in tensors_in(batch):
                if tensor.dim() > 1 and not tensor.is_floating_point():
                    longest = max(longest, tensor[0].numel())
        return max(self.data.rows) * longest

    # ---- roles ---------------------------------------------------------------------------------

    def reference(self, interventions: Interventions = ()) -> Recording:
        """Return the full-batch run in float64."""
        interventions = tuple(each for each in interventions if each.both)

        def make() -> Recording:
            if self.crew is not None:
                self.crew.start()  # They load the user's code while the full batch runs.
            keeper = Keeper(self._objective if self.has_objective and not interventions else None)
            self._keepers.append(keeper)
            return self._full("reference", keeper, interventions)

        return self._once(("reference", interventions), make)

    def reference_of_length(self, length: int) -> Recording:
        """Return the full-batch run whose `len(loader)` says something else."""
        return self._once(
            ("length", length),
            lambda: self._full("full_batch", Comparer(self.reference()), (), length=length),
        )

    def reference_of_horizon(self, steps: int) -> Recording:
        """Return the full-batch run that is told another number of optimizer steps, by its loader too."""
        return self._once(
            ("horizon", steps),
            lambda: self._full(
                "full_batch", Comparer(self.reference()), (), length=steps, optimizer_steps=steps
            ),
        )

    def altered_reference(self, interventions: Interventions) -> Recording:
        """Return the full-batch run with something put right, compared with the one as written."""
        schedule = self.reference().places(self.cycles())
        return self._once(
            ("altered", interventions),
            lambda: self._full(
                "reference", Comparer(self.reference()), interventions, schedule=schedule
            ),
        )

    def control(self, which: int = 0, *, seed_offset: int = 0, permuted: bool = True) -> Recording:
        """Return the full-batch run with its blocks of rows permuted."""

        def make() -> Recording:
            data = self._promoted
            full: list[list[int]] = []
            orders = None
            for batch, slices in enumerate(self.slices(data)):
                rows = (
                    block_permutation(slices, which) if permuted else list(range(data.rows[batch]))
                )
                full.append([data.start(batch) + row for row in rows])
            if permuted and "dataset" in self.wants:
                orders = self._permuted_orders(which)
            return self._full(
                "control",
                Comparer(self.reference()),
                (),
                micro_batches=full,
                orders=orders,
                seed_offset=seed_offset,
            )

        return self._once(("control", which, seed_offset, permuted), make)

    def reseeded_within(self) -> Recording:
        """Return the full-batch run with other seeds from the first micro-batch on."""
        return self._once(
            ("reseeded within",),
            lambda: self._full(
                "control", Comparer(self.reference()), (), seed_offset=1, reseeds_within=True
            ),
        )

    def _permuted_orders(self, which: int) -> list[list[int]]:
        """Permute, for map-style access, only within the rows that one reference step consumed."""
        fetched = [key for keys in self.reference().fetched for key in keys]
        passes = 1 + max((passed for passed, _ in fetched), default=0)
        total = self.reference().own_length or self._promoted.total
        orders = [list(range(total)) for _ in range(passes)]
        seen: set[Key] = set()
        for step in self.reference().steps:
            for passed in range(passes):
                mine = [
                    key
                    for key in dict.fromkeys(fetched)
                    if key[0] == passed and key in step.samples and key not in seen
                ]
                seen.update(mine)
                parts = self.case.accumulation_steps * self.case.shares
                size = max(-(-len(mine) // parts), 1)
                blocks = [(i, min(i + size, len(mine))) for i in range(0, len(mine), size)]
                if not blocks:
                    continue
                for (_, position), row in zip(mine, block_permutation(blocks, which), strict=True):
                    orders[passed][position] = mine[row][1]
        return orders

    def perturbed(self) -> Recording:
        """Return the full-batch run with parameters that are off by one rounding."""
        return self._once(
            ("perturbed",), lambda: self._full("control", Perturbed(self.reference()), ())
        )

    def candidate(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64."""
        reference = self.reference(interventions)

        def make() -> Recording:
            schedule = self.schedule_for(interventions)
            data = self.data_for(interventions, promoted=True)
            return self._accumulated(
                "candidate", Comparer(reference), data, interventions, schedule
            )

        return self._once(("candidate", interventions), make)

    def candidate_again(self) -> Recording:
        """Return the accumulated run once more: state that survived from earlier runs makes it differ."""
        return self._accumulated(
            "candidate", Comparer(self.reference()), self.data_for((), promoted=True), (), []
        )

    def other(self, accumulation_steps: int) -> Experiment:
        """Return the experiment at another K, which has the full batch in common."""

        def make() -> Experiment:
            other = SubjectExperiment.__new__(SubjectExperiment)
            other.__dict__.update(self.__dict__)
            other.case = replace(self.case, accumulation_steps=accumulation_steps)
            other.cuts = Cuts(other.case, self.data.rows)
            other._check_even()  # noqa: SLF001 - an experiment of this very class
            other.remembered = {}
            other._cache = {  # noqa: SLF001 - as above
                key: value for key, value in self._cache.items() if key[0] == "reference"
            }
            return other

        return self._once(("other", accumulation_steps), make)

    def contributed(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64 once more, with what each backward added.

        Raises:
            UsageError: The run has several processes, whose backwards are not put together.
        """

        def make() -> Recording:
            self._refuse_ranks()
            comparer = Comparer(self.reference(interventions), contributions=True)
            schedule = self.schedule_for(interventions)
            data = self.data_for(interventions, promoted=True)
            return self._accumulated("candidate", comparer, data, interventions, schedule)

        return self._once(("contributed", interventions), make)

    def contributed_whole(self) -> Recording:
        """Return the full-batch run once more, with what each backward added."""

        def make() -> Recording:
            return self._full("full_batch", Comparer(self.reference(), contributions=True), ())

        return self._once(("contributed whole",), make)

    def turned(self, by: int) -> Recording:
        """Return the accumulated run with the first `by` micro-batches of every cycle moved to its end.

        Same samples in every cycle, and what each backward added.
        """

        def make() -> Recording:
            data = self._promoted
            micro = self.cuts.turned(data, by)
            run = Run("candidate", data, micro, self.case.accumulation_steps, self.cuts.largest)
            return self._execute(run, Comparer(self.reference(), contributions=True))

        return self._once(("turned", by), make)

    def copies_moved(self) -> dict[str, Copies]:
        """Return when, and how far, the loop moves its copies of the weights: in three runs left to themselves.

        The full batches, the accumulated run, and the micro-batches each with a step of its own.
        """

        def make() -> dict[str, Copies]:
            data, k = self._promoted, self.case.accumulation_steps
            micro, full = self.micro_batches(data), data.full_batches()
            found = {}
            for role, batches, steps in (
                ("full_batch", full, 1),
                ("candidate", micro, k),
                ("pieces", micro, 1),
            ):
                copies = Copies()
                size = max(len(each) for each in batches)
                run = Run(role, data, batches, steps, size, interventions=[copies])
                self._execute(run, Observer())
                found[role] = copies
            return found

        return self._once(("copies moved",), make)

    def left_by_backward(self) -> Recording:
        """Return native_candidate once more, with the gradients as each cycle's last backward left them.

        Raises:
            UsageError: The run has several processes, whose backwards are not put together.
        """

        def make() -> Recording:
            self._refuse_ranks()
            comparer = Comparer(self.reference(), native=True, contributions=True, left=True)
            role = "native_candidate"
            return self._accumulated(role, comparer, self.data, (), [], promoted=False)

        return self._once(("left",), make)

    def left_on_ranks(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64 once more, with what each rank's last backward of a cycle left."""

        def make() -> Recording:
            comparer = Comparer(self.reference(interventions), contributions=True, left=True)
            schedule = self.schedule_for(interventions)
            data = self.data_for(interventions, promoted=True)
            return self._accumulated("candidate", comparer, data, interventions, schedule)

        return self._once(("left_on_ranks", interventions), make)

    def settled(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run left to itself, its parameters compared once the loop is done with a step."""

        def make() -> Recording:
            comparer = Settled(self.reference(interventions))
            schedule = self.schedule_for(interventions)
            data = self.data_for(interventions, promoted=True)
            return self._accumulated("candidate", comparer, data, interventions, schedule)

        return self._once(("settled", interventions), make)

    def left_by_full_batch(self) -> Recording:
        """Return the full-batch run once more, with what its backwards left."""
        return self._once(
            ("left_by_full_batch",),
            lambda: self._full(
                "full_batch", Comparer(self.reference(), contributions=True, left=True), ()
            ),
        )

    def _refuse_ranks(self) -> None:
        if self.case.world_size > 1:
            raise UsageError(f"backwards of {self.case.world_size} ranks are not put together")

    def native(self, role: str) -> Recording:
        """Return native_reference or native_candidate: as written, from the reference's states."""

        def make() -> Recording:
            comparer = Comparer(
                self.reference(), native=True, contributions=role == "native_candidate"
            )
            if role == "native_reference":
                return self._full(role, comparer, (), promoted=False)
            return self._accumulated(role, comparer, self.data, (), [], promoted=False)

        return self._once((role,), make)

    def pieces(self, interventions: Interventions = ()) -> dict[tuple[str, frozenset[Key]], Step]:
        """Return the gradient of every micro-batch alone, by optimizer and samples."""
        interventions = tuple(each for each in interventions if each.both)

        def make() -> dict[tuple[str, frozenset[Key]], Step]:
            data = self.data_for(interventions, promoted=True)
            reference = self.reference(interventions)
            micro = self._alone(data)
            observer = Pieces(reference, self.cycles(interventions))
            run = Run(
                "pieces",
                data,
                micro,
                1,
                self.cuts.largest,
                orders=self._orders_of_ranks(),
                optimizer_steps=len(micro),
                interventions=list(interventions),
            )
            recording = self._execute(run, observer)
            found: dict[tuple[str, frozenset[Key]], Step] = {}
            for step in recording.steps:
                found[step.optimizer, step.samples] = step
            self._cache["pieces_recording", interventions, self.together] = recording
            return found

        return self._once(("pieces", interventions, self.together), make)

    def _dealt(self, passed: int = 0) -> list[int] | None:
        """Return the samples of one pass as ranks take them: in each cycle those of rank 0, then those of rank 1 ...

        None where the loop does not share a data set out by itself. A sampler may deal samples out one by one, or
        batches.
        """
        if "dataset" not in self.wants or self.crew is None or self.case.shares == 1:
            return None
        taken = [
            [sample for keys in each.fetched for by, sample in keys if by == passed]
            for each in self.candidate().ranks
        ]
        return self.cuts.dealt(taken)

    def _orders_of_ranks(self) -> list[list[int]] | None:
        """Return what stands where for a loop that shares the data set out itself, and is given single micro-batches.

        Each then holds the samples that one rank takes together. None where ranks take other samples than the
        full-batch run.
        """
        if self.together or self._dealt() is None:
            return None
        fetched = dict.fromkeys(key for keys in self.reference().fetched for key in keys)
        orders = []
        for passed in range(1 + max((each for each, _ in fetched), default=0)):
            order = list(range(self.reference().own_length or self._promoted.total))
            dealt = self._dealt(passed) or []
            places = [place for each, place in fetched if each == passed]
            if sorted(dealt) != sorted(places):
                return None
            for place, sample in zip(places, dealt, strict=True):
                order[place] = sample
            orders.append(order)
        return orders

    def alone_of_length(self, length: int) -> Recording:
        """Return the run that steps after every micro-batch, told that the loader has another length."""

        def make() -> Recording:
            data = self.data_for((), promoted=True)
            micro = self.micro_batches(data)
            size = self.cuts.largest
            run = Run("pieces", data, micro, 1, size, length=length, optimizer_steps=length)
            return self._execute(run, Pieces(self.reference(), self.cycles()))

        return self._once(("alone", length), make)

    def full_batch_alone(self, index: int) -> Recording:
        """Return the run of one full batch, from the state that its step starts from: without what the loop keeps."""

        def make() -> Recording:
            rows = self._promoted.full_batches()[index]
            run = Run(
                "full_batch",
                self._promoted,
                [rows],
                1,
                max(self.data.rows),
                optimizer_steps=1,
            )
            return self._execute(run, Pieces(self.reference(), self.cycles()))

        return self._once(("full_batch_alone", index), make)

    def begun_with(self, micro_step: int) -> list[Step]:
        """Return the first steps, of every optimizer, of a run that is given one micro-batch of the first cycle."""
        if "dataset" in self.wants:
            return super().begun_with(micro_step)

        def make() -> list[Step]:
            data = self.data_for((), promoted=True)
            micro = [self._alone(data)[micro_step]]
            run = Run("pieces", data, micro, 1, self.cuts.largest, optimizer_steps=1)
            return self._execute(run, Pieces(self.reference(), self.cycles())).steps

        return self._once(("begun with", micro_step), make)

    def pieces_recording(self, interventions: Interventions = ()) -> Recording:
        """Return the run that took the pieces."""
        interventions = tuple(each for each in interventions if each.both)
        self.pieces(interventions)
        return self._cache["pieces_recording", interventions, self.together]  # type: ignore[no-any-return]

    def attributions(self, interventions: Interventions = ()) -> list[Attribution]:
        """Return the weights of every matched step whose micro-batches were all seen alone."""

        def make() -> list[Attribution]:
            pieces = self.pieces(interventions)
            reference = self.reference(interventions)
            candidate = self.candidate(interventions)
            data = self.data_for(interventions, promoted=True)
            of_cycle: dict[int, list[frozenset[Key]]] = {}
            cycles = self.cycles(interventions)
            for passed in range(1 + max((p for p, _ in cycles), default=0)):
                for samples in self._alone(data):
                    keys = frozenset((passed, sample) for sample in samples)
                    cycle = cycles.get((passed, samples[0]))
                    if cycle is not None:
                        of_cycle.setdefault(cycle, []).append(keys)
            found = []
            for step in candidate.steps:
                if step.matched is None:
                    continue
                target = reference.steps[step.matched]
                cycle = self.cycle_of(target, cycles)
                micro = of_cycle.get(cycle, [])
                if "dataset" in self.wants:
                    micro = [s for (o, s) in pieces if o == step.optimizer and s <= target.samples]
                steps = [pieces.get((step.optimizer, keys)) for keys in micro]
                if not steps or any(each is None for each in steps):
                    continue
                start = reference.kept[cycle - 1] if cycle > 0 else reference.initial
                found.append(
                    attribute(
                        step,
                        target,
                        [each for each in steps if each is not None],
                        sampled(start),
                        1 if self.together else self.case.shares,
                    )
                )
            return found

        return self._once(("attributions", interventions, self.together), make)

    # ---- running -------------------------------------------------------------------------------

    def _full(
        self,
        role: str,
        observer: Observer,
        interventions: Interventions,
        *,
        promoted: bool = True,
        micro_batches: list[list[int]] | None = None,
        orders: list[list[int]] | None = None,
        seed_offset: int = 0,
        reseeds_within: bool = False,
        schedule: list[Place] | None = None,
        length: int | None = None,
        optimizer_steps: int = 0,
    ) -> Recording:
        data = self.data_for(interventions, promoted=promoted)
        run = Run(
            role,
            data,
            micro_batches or data.full_batches(),
            1,
            max(data.rows),
            is_promoted=promoted,
            orders=orders,
            length=length,
            seed_offset=seed_offset,
            reseeds_within=reseeds_within,
            optimizer_steps=optimizer_steps,
            interventions=list(interventions),
            schedule=schedule or [],
        )
        return self._execute(run, observer)

    def _accumulated(
        self,
        role: str,
        observer: Observer,
        data: Data,
        interventions: Interventions,
        schedule: list[Place],
        *,
        promoted: bool = True,
    ) -> Recording:
        if self.crew is not None:
            return self._on_ranks(role, observer, data, interventions, promoted=promoted)
        lengths = [each.length for each in interventions if each.length is not None]
        run = Run(
            role,
            data,
            self.micro_batches(data),
            self.case.accumulation_steps,
            self.cuts.largest,
            is_promoted=promoted,
            length=lengths[0] if lengths else None,
            interventions=list(interventions),
            schedule=schedule,
        )
        return self._execute(run, observer)

    def _on_ranks(
        self,
        role: str,
        observer: Observer,
        data: Data,
        interventions: Interventions,
        *,
        promoted: bool,
    ) -> Recording:
        """Return the accumulated run of all ranks together."""
        assert self.crew is not None
        lengths = [each.length for each in interventions if each.length is not None]
        cut = without_tail(interventions)
        written = self.candidate(cut).ranks if cut != interventions else []
        runs = []
        for rank in range(self.case.world_size):
            micro = self.cuts.of_rank(data, rank)
            run = Run(
                role,
                data,
                micro,
                self.case.accumulation_steps,
                self.cuts.largest,
                is_promoted=promoted,
                length=lengths[0] if lengths else None,
                interventions=list(interventions),
                schedule=written[rank].places(self.cycles(cut)) if written else [],
                rank=rank,
                part=rank if self.case.shares > 1 else 0,
                world_size=self.case.world_size,
                cut=self.case.shares == 1,
                share=None
                if "dataset" in self.wants
                else frozenset(sample for samples in micro for sample in samples),
            )
            self._prepare(run)
            runs.append(run)
        self._progress(role)
        recordings, gathered = self.crew.run(self.case, runs, observer)
        for index, each in enumerate(interventions):
            each.take_back([by_rank[index] for by_rank in gathered])
        recording = merged(recordings, self.reference(interventions))
        self.runs.append({"role": role, "seconds": recording.seconds})
        return recording

    def _prepare(self, run: Run) -> None:
        """Tell a run what earlier ones have shown of the loop."""
        run.is_promoted = run.is_promoted and self.is_promoted
        if run.role != "reference":
            run.own_length = self.reference().own_length
            run.prefetches = self.reference().prefetched > 0
            run.in_order = self.reference().uses == sorted(self.reference().uses)
            if run.prefetches and not run.is_promoted and self.is_promoted:
                known = self.candidate() if run.role == "native_candidate" else self.reference()
                known = known.ranks[run.rank] if known.ranks else known
                run.boundaries = known.boundaries

    def _execute(self, run: Run, observer: Observer) -> Recording:
        self._progress(run.role)
        self._prepare(run)
        recording = execute(self._subject, self.case, run, observer)
        self.runs.append({"role": run.role, "seconds": recording.seconds})
        return recording

    def _objective(self, recorder: Recorder, step: Step) -> dict[str, torch.Tensor | None] | None:
        """Return the gradient of the stated objective at this step's full batch, from the user's own statement."""
        assert recorder.data is not None
        assert recorder.code is not None
        assert recorder.code.objective is not None
        batches = {recorder.data.locate(sample)[0] for _, sample in step.samples}
        if len(batches) != 1:
            return None
        names = recorder.recording.optimizers[step.optimizer]
        parameters = dict(recorder.model.named_parameters())
        wanted = [name for name in names if name in parameters and parameters[name].requires_grad]
        buffers = {name: buffer.detach().clone() for name, buffer in recorder.model.named_buffers()}
        with recorder.paused(), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            index = batches.pop()
            # A copy: what the objective does to its batch must not reach the other roles.
            rows = list(range(recorder.data.rows[index]))
            loss = recorder.code.objective(recorder.model, take(recorder.data.batches[index], rows))
            gradients = torch.autograd.grad(
                loss, [parameters[name] for name in wanted], allow_unused=True
            )
        for name, buffer in recorder.model.named_buffers():
            buffer.detach().copy_(buffers[name])
        return dict(
            zip(wanted, (None if g is None else g.detach() for g in gradients), strict=True)
        )


def _total(tensor: torch.Tensor) -> float:
    """Return a sum, of whole numbers exactly."""
    return float(tensor.double().sum()) if tensor.is_floating_point() else int(tensor.sum())
