"""Compares a run with the reference inside its own hooks.

After each optimizer step the run is set to the reference's state, so that each is judged on its own, from the same
parameters, buffers and optimizer state.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.differences import Sums, far_apart, sums_many
from equivcheck.errors import StepError
from equivcheck.observe import Gradients, Sampler, compare, measured, shadows_of
from equivcheck.parts import part_like
from equivcheck.recording import Kept, Recording, Step
from equivcheck.shadow import shadow_weights
from equivcheck.states import numbers, set_state, state_of

if TYPE_CHECKING:
    from equivcheck.feed import Key
    from equivcheck.recorder import Recorder

# A gradient element that differs by more than this share of itself, in a tensor that agrees as a whole, is rounding
# noise around zero: what a sign- or ratio-based optimizer makes of it says nothing. A fault of less than this share
# is still seen in the gradient itself, which is judged first.
NOISY_ELEMENT = 1e-9
# A gradient that differs by more than this as a whole is no noise: its update is shown as it is.
DIFFERENT = 1e-6
# Where the code computes as written its rounding may be that of bfloat16.
DIFFERENT_AS_WRITTEN = 0.1


class Comparer(Sampler):
    """Compares a run with the reference in its hooks, and sets it to the reference's state after each step.

    Args:
        reference: The recording that was kept.
        native: The run computes as written: gradients are sampled and compared, parameters and state are set only.
        contributions: Keep what each backward adds, at the sampled coordinates.
        left: Keep what the last backward leaves, too.
    """

    def __init__(
        self,
        reference: Recording,
        *,
        native: bool = False,
        contributions: bool = False,
        left: bool = False,
    ) -> None:
        super().__init__()
        self._reference = reference
        self._native = native
        self._want_contributions = contributions
        self._want_left = left
        self._queues = {
            key: [s for s in reference.steps if s.optimizer == key] for key in reference.optimizers
        }
        self._collected: dict[str, set[Any]] = {}
        self._gradients: Gradients = {}
        self._wanted: Gradients = {}
        self._contributed: list[dict[str, torch.Tensor]] = []
        self._left: dict[str, torch.Tensor | None] = {}
        self._share: frozenset[int] | None = None
        self._ranks = 1

    def gradients(
        self, recorder: Recorder, step: Step, gradients: Gradients, applied: Gradients
    ) -> None:
        self.sample(recorder, step, gradients)
        if self._arrived:
            self._contributed, self._arrived = self._arrived, []
        # Of two optimizers that step on the same backwards, the second has the same.
        step.contributions = self._contributed
        step.left = {name: self._left.get(name) for name in gradients} if self._left else {}
        self._share, self._ranks = recorder.share, recorder.world_size
        self._match(step)
        if step.matched is None:
            return
        kept = self._reference.kept[step.matched]
        self._gradients = gradients
        self._wanted = mine_of(recorder, kept.gradients, gradients)
        if recorder.world_size > 1:
            _refuse_unknown_parts(recorder, step, self._wanted, gradients)
        step.gradients = compare(self._wanted, gradients, step)
        step.applied = (
            step.gradients
            if all(applied[n] is gradients[n] for n in applied)
            and all(kept.applied[n] is kept.gradients[n] for n in kept.applied)
            else compare(mine_of(recorder, kept.applied, gradients), applied, None)
        )
        step.shadows = _compare_shadows(kept.shadows, shadows_of(recorder, torch.clone), step)
        kept.release()

    def _match(self, step: Step) -> None:
        """Find the reference's step that consumed the same samples; note extra and missing ones.

        Of several ranks each sees its own share of them.
        """
        queue = self._queue_of(step)
        collected = self._collected.setdefault(step.optimizer, set())
        collected |= step.samples
        for skipped, other in enumerate(queue):
            if self._is_share(collected, other.samples):
                step.matched = other.index
                step.missing = skipped
                del queue[: skipped + 1]
                collected.clear()
                return
            if not other.samples or not self._in_share(other.samples) < collected:
                return
            # The samples of this reference step and of later ones came in one candidate step: it is missing.
            union = set().union(*(each.samples for each in queue[: skipped + 1]))
            if self._is_share(collected, union):
                del queue[: skipped + 1]
                step.missing = skipped + 1
                collected.clear()
                return

    def _queue_of(self, step: Step) -> list[Step]:
        """Return the reference's steps that an optimizer has not made yet.

        An optimizer of a rank may be of another class, or hold some of the parameters only.
        """
        if step.optimizer not in self._queues:
            mine = set(step.sample)
            shared = {
                key: len(mine & set(names)) for key, names in self._reference.optimizers.items()
            }
            key = max(shared, key=lambda k: shared[k], default="")
            self._queues[step.optimizer] = (
                [s for s in self._reference.steps if s.optimizer == key]
                if self._ranks > 1 and shared.get(key)
                else []
            )
        return self._queues[step.optimizer]

    def _in_share(self, samples: Collection[Key]) -> set[Key]:
        """Return those of a full batch's samples that this rank is given; all of them where that is not known."""
        return {key for key in samples if self._share is None or key[1] in self._share}

    def _is_share(self, mine: Collection[Key], samples: Collection[Key]) -> bool:
        """Return whether a rank has consumed its whole share of a full batch's samples.

        Where ranks share a data set by themselves any equal part is one; whether all parts make the whole is seen
        when the ranks are put together.
        """
        if self._share is not None or self._ranks == 1:
            return set(mine) == self._in_share(samples)
        return set(mine) <= set(samples) and len(mine) >= len(samples) // self._ranks > 0

    def after(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        if step.matched is None:
            return
        kept = self._reference.kept[step.matched]
        if not self._native:
            self._compare_state(recorder, step, optimizer, kept)
        set_state(recorder, optimizer, kept)
        kept.release()
        self._gradients, self._wanted = {}, {}

    def _compare_state(
        self, recorder: Recorder, step: Step, optimizer: Optimizer, kept: Kept
    ) -> None:
        self._different = DIFFERENT if recorder.is_promoted else DIFFERENT_AS_WRITTEN
        mine = set(recorder.recording.optimizers[step.optimizer])
        masks = {name: self._mask(name, step) for name in mine | set(kept.state)}
        updates = []
        for name, wanted, parameter in updated(recorder, kept):
            mask = masks.get(name) if name in mine else None
            updates.append((name, wanted, parameter, mask))
        state = state_of(recorder, optimizer, lambda tensor: tensor)
        moments = []
        for name, entries in kept.state.items():
            if recorder.holdings is not None and name not in state:
                continue  # Another rank has it, or none: that is seen when they are put together.
            others = dict(numbers(state.get(name, {})))
            for key, value in numbers(mine_of(recorder, entries, entries, name)):
                other = others.get(key)
                if other is None or other.shape != value.shape:
                    step.none_mismatch.append(f"{name}.{key}")
                    continue
                moments.append((f"{name}.{key}", value, other, masks[name]))
        buffers = [
            (name, kept.buffers[name], buffer, None)
            for name, buffer in recorder.model.named_buffers()
            if name in kept.buffers and kept.buffers[name].shape == buffer.shape
        ]
        step.parameters = measured(updates)
        kept.release()
        step.state = measured(moments)
        kept.release()
        step.buffers = measured(buffers)

    def _mask(self, name: str, step: Step) -> torch.Tensor | None:
        """Return which elements of a parameter have a gradient that says something; None for all."""
        reference, candidate = self._wanted.get(name), self._gradients.get(name)
        if reference is None or candidate is None:
            return None
        difference = step.gradients.get(name)
        if difference is None or difference.dd == 0.0:
            return None
        # Beside the whole gradient: of a tensor whose gradient is zero nothing but noise is left.
        whole = sum(each.rr for each in step.gradients.values())
        if not difference.dd <= self._different**2 * whole:
            return None
        noisy = far_apart(reference, candidate, NOISY_ELEMENT)
        count = int(noisy.sum())
        if not count:
            return None
        step.masked[name] = count
        return noisy.logical_not_()

    def finish(self, recorder: Recorder) -> None:
        if self._native or not self._reference.kept:
            return
        last = self._reference.kept[-1].shadows
        if recorder.recording.steps:
            step = recorder.recording.steps[-1]
            found = _compare_shadows(last, shadows_of(recorder, torch.clone, ended=True), step)
            step.shadows = _worse(step.shadows, found)

    @contextmanager
    def contributions(self, recorder: Recorder) -> Iterator[None]:
        if not self._want_contributions:
            yield
            return
        with self.arriving(recorder):
            yield
        if self._want_left:
            with torch.no_grad():
                self._left = self._as_left(recorder)

    def _as_left(self, recorder: Recorder) -> dict[str, torch.Tensor | None]:
        """Return the gradients as they are now, at the sampled coordinates; of a rank, of the parts that it holds."""
        if recorder.holdings is None:
            return {
                name: None if p.grad is None else self.take(name, p.grad)
                for name, p in recorder.parameters().items()
            }
        self._find_places(recorder.holdings)
        return {
            part.name: None
            if part.holder.grad is None
            else self.take(part.name, part.local(part.holder.grad))
            for part in recorder.holdings.held()
        }

    def returned(self, recorder: Recorder, inputs: Any, result: Any) -> None:
        if self._want_contributions:
            self._arrived.append(
                {
                    recorder.names[id(p)]: self.take(recorder.names[id(p)], g)
                    for p, g in zip(inputs, result, strict=True)
                    if id(p) in recorder.names and g is not None
                }
            )


class Perturbed(Comparer):
    """A control whose parameters are off by one rounding, up or down at random, at the start and after every step.

    A permutation changes the order of sums and nothing else: each row is computed by the same kernel from the same
    numbers, so that its control says nothing of what rounding *within* a row becomes. A micro-batch has other rows per
    matrix product, other kernels, and other roundings. A linear layer with offset 1e3 before a layer norm shows
    4e-13 when accumulated, and 2e-16 in any permutation; parameters perturbed by one rounding show what that code makes
    of a rounding: its condition.
    Source: a computed matrix product is the exact one of operands perturbed by roundings (Higham, Accuracy and
    Stability of Numerical Algorithms, 2nd ed., sec. 3.5); measuring by random perturbation is Parker's Monte Carlo
    arithmetic (Monte Carlo Arithmetic, UCLA CSD-970002, 1997).
    """

    def __init__(self, reference: Recording) -> None:
        super().__init__(reference)
        self._seed = 0

    def start(self, recorder: Recorder) -> None:
        super().start(recorder)
        self._perturb(recorder)

    def after(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        super().after(recorder, step, optimizer)
        self._perturb(recorder)

    @torch.no_grad()
    def _perturb(self, recorder: Recorder) -> None:
        for parameter in recorder.parameters().values():
            if parameter.is_floating_point():
                self._seed += 1
                # Its own generator: the user's draws must stay what they are.
                generator = torch.Generator(parameter.device).manual_seed(self._seed)
                signs = torch.empty_like(parameter, dtype=torch.float32).bernoulli_(
                    0.5, generator=generator
                )
                step = torch.finfo(parameter.dtype).eps
                parameter.detach().mul_(1.0 + step * (2.0 * signs - 1.0).to(parameter.dtype))


class Pieces(Comparer):
    """Takes each micro-batch's gradient alone: after every step the run is set to the state its next cycle starts from.

    Args:
        reference: The recording that was kept.
        cycles: The reference step that each sample belongs to.
    """

    def __init__(self, reference: Recording, cycles: dict[Any, int]) -> None:
        super().__init__(reference)
        self._cycles = cycles

    def gradients(
        self, recorder: Recorder, step: Step, gradients: Gradients, _applied: Gradients
    ) -> None:
        self.sample(recorder, step, gradients)

    def after(self, recorder: Recorder, _step: Step, _optimizer: Optimizer) -> None:
        """Set the state of the next micro-batch, where a loop fetched it long before and copies it.

        In other loops it is set when the micro-batch is fetched, or used.
        """
        fetched, following = recorder.recording.fetched, recorder.backwards
        if recorder.usage.prefetches and not recorder.recording.uses and following < len(fetched):
            self.enter(recorder, fetched[following][0])

    def enter(self, recorder: Recorder, key: Any) -> None:
        """Set the model to the state that the cycle of a sample starts from."""
        cycle = self._cycles.get(key, 0)
        kept = self._reference.kept[cycle - 1] if cycle > 0 else self._reference.initial
        if kept is not None:
            with torch.no_grad():
                set_state(recorder, None, kept)
                parameters = recorder.parameters()
                for name, tensor in kept.begins.items():
                    if name in parameters:
                        parameters[name].detach().copy_(tensor)
        self._set_shadows(recorder, cycle)

    def _set_shadows(self, recorder: Recorder, cycle: int) -> None:
        """Set the loop's own copies of the weights to what they are at this cycle's step: a teacher makes a loss."""
        if recorder.holdings is not None or cycle >= len(self._reference.kept):
            return
        wanted = self._reference.kept[cycle].shadows
        if not wanted:
            return
        with torch.no_grad():
            for name, tensor in shadow_weights(recorder).items():
                if name in wanted and wanted[name].shape == tensor.shape:
                    tensor.copy_(wanted[name])


def mine_of(
    recorder: Recorder, tensors: Mapping[str, Any], names: Collection[str], of: str | None = None
) -> dict[str, Any]:
    """Return the reference's tensors as this process holds them: of a rank, the parts of those that it has.

    Args:
        recorder: Whose holdings count.
        tensors: By parameter; or the entries of one parameter's state.
        names: Those that are wanted.
        of: The parameter whose entries they are.
    """
    holdings = recorder.holdings
    if holdings is None:
        return dict(tensors)
    found: dict[str, Any] = {}
    for name in names:
        tensor, part = tensors.get(name), holdings.of(of or name)
        if part is not None and isinstance(tensor, torch.Tensor) and tensor.dim():
            tensor = part.cut(tensor)
        found[name] = tensor
    return found


def _refuse_unknown_parts(
    recorder: Recorder, step: Step, reference: Gradients, candidate: Gradients
) -> None:
    """Raise where a rank steps a tensor of which it is not known what part of the full batch's it is."""
    for name, wanted in reference.items():
        mine = candidate.get(name)
        if wanted is None or mine is None or wanted.shape == mine.shape:
            continue
        raise StepError(
            f"unknown-parts: {name} is {tuple(mine.shape)}, not {tuple(wanted.shape)}"[:100],
            where=f"{recorder.recording.role}, rank {recorder.rank}, optimizer_step {step.index}",
            expected="whole parameters on every rank, or parts as DDP, FSDP, DTensor and ZeroRedundancyOptimizer "
            "make them",
            because="a framework has shared the parameters out among the ranks in a way of its own (DeepSpeed's ZeRO "
            "does), and its parts cannot be put together",
            fix="--world-size 1 checks the loop's accumulation",
        )


def updated(recorder: Recorder, kept: Kept) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield every parameter that is held: its name, what it ought to be, and what it is."""
    if recorder.holdings is None:
        for name, parameter in recorder.parameters().items():
            if name in kept.after:
                yield name, kept.after[name], parameter.detach()
        return
    for part in recorder.holdings.held():
        if part.name in kept.after:
            yield part.name, part.cut(kept.after[part.name]), part.local(part.holder.detach())


def _compare_shadows(
    reference: dict[str, torch.Tensor], candidate: dict[str, torch.Tensor], step: Step
) -> dict[str, Sums]:
    """Measure the copies of the weights that both have; of those that a rank shards like its weights, its part."""
    pairs = {}
    for name, whole in reference.items():
        mine = candidate.get(name)
        part = part_like(mine, name, tuple(whole.shape)) if mine is not None else None
        if part is not None:
            pairs[name] = part.cut(whole), part.local(part.holder)
            if not part.is_whole:
                step.parts[name] = part.key
    return dict(zip(pairs, sums_many(list(pairs.values())), strict=True))


def _worse(a: dict[str, Sums], b: dict[str, Sums]) -> dict[str, Sums]:
    return {
        name: max((each[name] for each in (a, b) if name in each), key=lambda s: s.relative)
        for name in a | b
    }
