"""The experiment: the runs that decide one case, each made when it is first asked for.

| role | batching | arithmetic |
| --- | --- | --- |
| reference | full batch | float64 |
| control | full batch, blocks of rows permuted | float64 |
| candidate | accumulated | float64 |
| native_reference, native_candidate | full batch, accumulated | as written |
| pieces | every micro-batch alone, from the state its cycle starts from | float64 |
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from equivcheck.attribution import Weights, solve
from equivcheck.case import Case
from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.execute import Run, execute, seed_all
from equivcheck.feed import Data, Key, read_batches
from equivcheck.interventions import Intervention
from equivcheck.noise import coordinates
from equivcheck.observe import Comparer, Keeper, Observer, Perturbed, Pieces
from equivcheck.promotion import promote_tree
from equivcheck.recorder import Recorder
from equivcheck.recording import Kept, Place, Recording, Step
from equivcheck.split import block_permutation, plan, take, tensors_in
from equivcheck.subject import Subject
from equivcheck.verdict import Judgement, Noise, judge, roundoff_of, unfit

# What rounding may become in code of condition 1e12, beyond which float64 itself decides nothing: a difference below it
# is worth a run with perturbed parameters.
CLOSE = 1e-4

Interventions = tuple[Intervention, ...]
T = TypeVar("T")


@dataclass
class Attribution:
    """Which weights made the gradients of one cycle.

    Attributes:
        step: Index of the candidate's step.
        matched: Index of the reference's step: the cycle.
        pieces: [K, n] float64, sampled coordinates of every micro-batch alone.
        reference, candidate: [n] float64.
        v, w: Fits of the two.
        names: Parameters in the order of the coordinates, with their length.
        weights_piece: [n] float64, the parameters themselves, where the reference needs them as a
            piece more: a penalty that is put into the gradients; else None.
    """

    step: int
    matched: int
    pieces: torch.Tensor
    reference: torch.Tensor
    candidate: torch.Tensor
    v: Weights
    w: Weights
    names: list[tuple[str, int]]
    weights_piece: torch.Tensor | None = None

    def only(self, names: frozenset[str]) -> Attribution:
        """Return the fit over some parameters alone."""
        index, kept, begin = [], [], 0
        for name, length in self.names:
            if name in names:
                index.append(torch.arange(begin, begin + length))
                kept.append((name, length))
            begin += length
        chosen = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
        pieces, r, c = self.pieces[:, chosen], self.reference[chosen], self.candidate[chosen]
        return Attribution(
            self.step, self.matched, pieces, r, c, solve(pieces, r), solve(pieces, c), kept
        )


class Experiment:
    """Runs one case, role by role, and remembers what was run.

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
        self.is_promoted = promoted
        self.subject = subject
        self.case = case
        self.notes: list[str] = []
        self.runs: list[dict[str, Any]] = []
        self._progress = progress
        self._cache: dict[Any, Any] = {}
        self.remembered: dict[Any, Any] = {}
        self._keepers: list[Keeper] = []
        seed_all(case.seed)  # modules may draw while they are imported
        code = subject.fresh()
        seed_all(case.seed)
        self.data = read_batches(code.batches, case.optimizer_steps)
        self._promoted = (
            Data([promote_tree(batch) for batch in self.data.batches], self.data.rows)
            if promoted
            else self.data
        )
        self.has_objective = code.objective is not None
        self.wants = set(inspect.signature(code.train).parameters)
        self.plan = plan(self.data.rows, case.accumulation_steps, case.split)
        self._check_even()

    def _check_even(self) -> None:
        named = sorted({"dataset", "micro_batch_size"} & self.wants)
        if not named:
            return
        k = self.case.accumulation_steps
        if self.case.split != "even":
            raise UsageError(
                f"uneven-split: train takes {' and '.join(named)}: slices of one size",
                expected="--split even",
                because="a framework that batches by itself cannot be given uneven slices",
            )
        rows = self.data.rows[:-1] if self.data.has_tail else self.data.rows
        for index, count in enumerate(rows):
            if count % k:
                fitting = next(d for d in range(2, count + 1) if count % d == 0)
                raise UsageError(
                    f"indivisible-batch: full batch {index} has {count} rows, not a multiple of {k}",
                    where=self.subject.location,
                    expected=f"rows divisible by {k}, because train takes {' and '.join(named)}",
                    fix=f"--accumulation-steps {fitting}",
                )

    def close(self) -> None:
        """Remove what was kept on disk."""
        for keeper in self._keepers:
            keeper.shelf.close()

    # ---- geometry ------------------------------------------------------------------------------

    def data_for(self, interventions: Interventions, *, promoted: bool) -> Data:
        """Return the data of a run."""
        data = self._promoted if promoted else self.data
        return data.shorter() if any(each.shorter for each in interventions) else data

    def slices(
        self, data: Data, accumulation_steps: int | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return, per full batch, the first and last row of every micro-batch."""
        cycles = self.plan
        if accumulation_steps is not None:
            cycles = plan(self.data.rows, accumulation_steps, self.case.split)
        return [cycle[0] for cycle in cycles[: len(data.rows)]]

    def micro_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-batch."""
        return [
            [data.start(batch) + row for row in range(start, stop)]
            for batch, slices in enumerate(self.slices(data))
            for start, stop in slices
        ]

    def full_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every full batch."""
        return [
            list(range(data.start(b), data.start(b) + rows)) for b, rows in enumerate(data.rows)
        ]

    @property
    def micro_batch_size(self) -> int:
        """The largest slice."""
        return max(stop - start for slices in self.slices(self.data) for start, stop in slices)

    # ---- roles ---------------------------------------------------------------------------------

    def reference(self, interventions: Interventions = ()) -> Recording:
        """Return the full-batch run in float64."""
        interventions = tuple(each for each in interventions if each.both)

        def make() -> Recording:
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
                size = max(-(-len(mine) // self.case.accumulation_steps), 1)
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
            schedule = self.schedule() if interventions else []
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

    def at(self, accumulation_steps: int) -> Recording:
        """Return the accumulated run with another K."""

        def make() -> Recording:
            other = Experiment.__new__(Experiment)
            other.__dict__.update(self.__dict__)
            other.case = replace(self.case, accumulation_steps=accumulation_steps)
            other.plan = plan(self.data.rows, accumulation_steps, self.case.split)
            other._cache = {  # noqa: SLF001 - an experiment of this very class
                key: value for key, value in self._cache.items() if key[0] == "reference"
            }
            return other.candidate()

        return self._once(("at", accumulation_steps), make)

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
            micro = self.micro_batches(data)
            observer = Pieces(reference, self.cycles(interventions))
            run = Run(
                "pieces",
                data,
                micro,
                1,
                self.micro_batch_size,
                optimizer_steps=len(micro),
                interventions=list(interventions),
            )
            recording = self._execute(run, observer)
            found: dict[tuple[str, frozenset[Key]], Step] = {}
            for step in recording.steps:
                found[step.optimizer, step.samples] = step
            self._cache["pieces_recording", interventions] = recording
            return found

        return self._once(("pieces", interventions), make)

    def pieces_recording(self, interventions: Interventions = ()) -> Recording:
        """Return the run that took the pieces."""
        interventions = tuple(each for each in interventions if each.both)
        self.pieces(interventions)
        return self._cache["pieces_recording", interventions]  # type: ignore[no-any-return]

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = make()
        found: T = self._cache[key]
        return found

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
        schedule: list[Place] | None = None,
        length: int | None = None,
    ) -> Recording:
        data = self.data_for(interventions, promoted=promoted)
        run = Run(
            role,
            data,
            micro_batches or self.full_batches(data),
            1,
            max(data.rows),
            is_promoted=promoted,
            orders=orders,
            length=length,
            seed_offset=seed_offset,
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
        lengths = [each.length for each in interventions if each.length is not None]
        run = Run(
            role,
            data,
            self.micro_batches(data),
            self.case.accumulation_steps,
            self.micro_batch_size,
            is_promoted=promoted,
            length=lengths[0] if lengths else None,
            interventions=list(interventions),
            schedule=schedule,
        )
        return self._execute(run, observer)

    def _execute(self, run: Run, observer: Observer) -> Recording:
        self._progress(run.role)
        run.is_promoted = run.is_promoted and self.is_promoted
        if run.role != "reference":
            run.own_length = self.reference().own_length
            run.prefetches = self.reference().prefetched > 0
            run.in_order = self.reference().uses == sorted(self.reference().uses)
            if run.prefetches and not run.is_promoted and self.is_promoted:
                known = self.candidate() if run.role == "native_candidate" else self.reference()
                run.boundaries = known.boundaries
        recording = execute(self.subject, self.case, run, observer)
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

    # ---- what follows from the runs ------------------------------------------------------------

    def cycles(self, interventions: Interventions = ()) -> dict[Key, int]:
        """Return, for every sample, the first reference step that consumed it."""
        found: dict[Key, int] = {}
        for step in self.reference(interventions).steps:
            for key in step.samples:
                found.setdefault(key, step.index)
        return found

    def schedule(self) -> list[Place]:
        """Return the place of every backward of the candidate as written."""
        return self.candidate().places(self.cycles())

    def terms(self) -> int:
        """Return the length of the longest sum behind a gradient: rows times the length of a row."""
        longest = 1
        for batch in self.data.batches:
            for tensor in tensors_in(batch):
                if tensor.dim() > 1 and not tensor.is_floating_point():
                    longest = max(longest, tensor[0].numel())
        return max(self.data.rows) * longest

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
        if result.same or not self._close(result):
            return result
        self.settle()
        return judge(reference, candidate, self.noise(), logged=logged)

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
                for samples in self.micro_batches(data):
                    keys = frozenset((passed, sample) for sample in samples)
                    cycle = cycles.get((passed, samples[0]))
                    if cycle is not None:
                        of_cycle.setdefault(cycle, []).append(keys)
            found = []
            for step in candidate.steps:
                if step.matched is None:
                    continue
                target = reference.steps[step.matched]
                cycle = min((cycles[key] for key in target.samples if key in cycles), default=-1)
                micro = of_cycle.get(cycle, [])
                if "dataset" in self.wants:
                    micro = [s for (o, s) in pieces if o == step.optimizer and s <= target.samples]
                steps = [pieces.get((step.optimizer, keys)) for keys in micro]
                if not steps or any(each is None for each in steps):
                    continue
                start = reference.kept[cycle - 1] if cycle > 0 else reference.initial
                found.append(
                    _attribution(
                        step, target, [each for each in steps if each is not None], _sampled(start)
                    )
                )
            return found

        return self._once(("attributions", interventions), make)


def _sampled(start: Kept | None) -> dict[str, torch.Tensor]:
    """Return the parameters that a step starts from, at the coordinates at which gradients are sampled."""
    if start is None:
        return {}
    chosen = coordinates({name: tensor.numel() for name, tensor in start.after.items()})
    found = {}
    for name, tensor in start.after.items():
        flat, indices = tensor.flatten(), chosen[name]
        found[name] = (flat if indices is None else flat[indices]).double()
    return found


def _attribution(
    step: Step, target: Step, pieces: Sequence[Step], weights: dict[str, torch.Tensor]
) -> Attribution:
    names = [(name, len(s)) for name, s in target.sample.items() if s is not None]
    matrix = torch.stack([_flat(piece, names) for piece in pieces])
    reference, candidate = _flat(target, names), _flat(step, names)
    assert step.matched is not None
    v, w, extra = solve(matrix, reference), solve(matrix, candidate), None
    if v.residual is not None and v.residual > BEYOND_ROUNDING:
        # A penalty on the weights, put into the gradients: the weights themselves are then a piece.
        theta = torch.cat([_or_zeros(weights.get(name), length) for name, length in names])
        with_theta = solve(torch.cat([matrix, theta[None]]), reference)
        if with_theta.residual is not None and with_theta.residual <= BEYOND_ROUNDING:
            k = matrix.shape[0]
            extra = theta
            v = replace(with_theta, values=with_theta.values[:k], solution=with_theta.solution[:k])
    return Attribution(step.index, step.matched, matrix, reference, candidate, v, w, names, extra)


# Residuals of fits lie at 1e-15 for what is in the span and at 1e-3 and more for what is not.
BEYOND_ROUNDING = 1e-9


def _or_zeros(tensor: torch.Tensor | None, length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.float64) if tensor is None else tensor


def _flat(step: Step, names: Sequence[tuple[str, int]]) -> torch.Tensor:
    parts = []
    for name, length in names:
        sample = step.sample.get(name)
        parts.append(torch.zeros(length, dtype=torch.float64) if sample is None else sample)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
