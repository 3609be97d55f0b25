"""What is taken from a run at each optimizer step: nothing, a sample of the gradients, or all that is compared with.

Only the reference is stored; the other roles are compared with it inside the hooks of their own runs (`comparers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.differences import Sums, dense, sums, sums_many
from equivcheck.noise import coordinates
from equivcheck.parts import Holdings, plain, positions
from equivcheck.recording import Kept, Step
from equivcheck.shadow import shadow_weights
from equivcheck.shelf import Shelf
from equivcheck.states import state_of

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

Gradients = dict[str, torch.Tensor | None]

# Coordinates that tell whether a parameter was changed by hand.
FEW = 32


@dataclass(frozen=True)
class Glimpse:
    """What an observer keeps of a gradient that is about to be changed, where it needs no whole copy.

    Attributes:
        values: The sampled coordinates, [n], on the cpu, in the gradient's own dtype.
        norm: L2 norm of all of it, a tensor without dimensions; not finite only where the gradient is not.
    """

    values: torch.Tensor
    norm: torch.Tensor

    def __mul__(self, share: float) -> Glimpse:
        return Glimpse(self.values * share, self.norm * abs(share))


class Observer:
    """Takes nothing; the base of those that do."""

    def before(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        """See the state before a step."""

    def gradients(
        self, recorder: Recorder, step: Step, gradients: Gradients, applied: Gradients
    ) -> None:
        """See the gradients of a step: before the last clip (unscaled), and as they are applied."""

    def after(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        """See, and set, the state after a step."""

    def start(self, recorder: Recorder) -> None:
        """See the state before the run."""

    def fetched(self, recorder: Recorder) -> None:
        """See the state before a micro-batch is handed out."""

    def snapshots(
        self, _recorder: Recorder, parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | Glimpse]:
        """Return what is kept of gradients that a clip is about to change, one for each parameter; all have one."""
        return [p.grad.detach().clone() for p in parameters if p.grad is not None]

    def take(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the coordinates of one parameter's tensor that are looked at, float64, on the cpu."""
        return tensor.detach().flatten().to("cpu", torch.float64, copy=True)

    def finish(self, recorder: Recorder) -> None:
        """See the state at the end of the run."""

    @contextmanager
    def contributions(self, _recorder: Recorder) -> Iterator[None]:
        """Surround one backward that accumulates."""
        yield

    def returned(self, recorder: Recorder, inputs: Any, result: Any) -> None:
        """See what `autograd.grad` returned."""


class Sampler(Observer):
    """Keeps a fixed sample of gradient coordinates, the same in every run."""

    def __init__(self) -> None:
        self._chosen: dict[str, torch.Tensor | None] = {}
        self._places: dict[str, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._arrived: list[dict[str, torch.Tensor]] = []

    def sample(self, recorder: Recorder, step: Step, gradients: Gradients) -> None:
        """Keep the sampled coordinates of each gradient, float64."""
        self.choose(recorder)
        if recorder.holdings is not None:
            self._find_places(recorder.holdings)
        step.sample = {
            name: None if gradient is None else self.take(name, gradient)
            for name, gradient in gradients.items()
        }
        present = [g for g in gradients.values() if g is not None]
        norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in present]
        step.norm = float(torch.stack(norms).norm()) if norms else 0.0
        # A finite norm has finite elements only; one that is not may have overflowed.
        step.finite = math.isfinite(step.norm) or all(
            bool(torch.isfinite(g).all()) for g in present
        )

    def choose(self, recorder: Recorder) -> None:
        """Choose the coordinates, once the parameters are known, and again if there are others."""
        sizes = recorder.sizes()
        if not self._chosen or self._chosen.keys() != sizes.keys():
            self._chosen = coordinates(sizes)

    def _find_places(self, holdings: Holdings) -> None:
        for part in holdings.held():
            if not part.is_whole and part.name not in self._places:
                chosen = self._chosen.get(part.name)
                self._places[part.name] = positions(part, chosen, holdings.shape(part.name))

    def take(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sampled coordinates of one parameter's tensor, float64, on the cpu.

        They are nan where another rank holds them.
        """
        if name in self._places:
            sampled, mine, count = self._places[name]
            found = torch.full((count,), math.nan, dtype=torch.float64)
            found[sampled] = dense(tensor.detach()).flatten()[mine].to("cpu", torch.float64)
            return found
        return self.sampled(name, tensor).to(torch.float64)

    def sampled(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sampled coordinates of one parameter's tensor, a copy in its own dtype, on the cpu."""
        chosen = self._chosen.get(name)
        flat = dense(tensor.detach()).flatten()
        if chosen is None:
            return flat.to("cpu", copy=True)
        # Three times as fast as an index in brackets where the tensor lies in no cache.
        return flat.index_select(0, chosen.to(flat.device)).to("cpu")

    def arrival(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """Return what is kept of a gradient that arrives at a whole parameter, whatever part of it this rank keeps."""
        return self.sampled(name, gradient).to(torch.float64)

    @contextmanager
    def arriving(self, recorder: Recorder) -> Iterator[None]:
        """Add to `_arrived`, after one root backward, the sampled coordinates of what it gave each parameter."""
        arrived: dict[str, torch.Tensor] = {}
        if not self._chosen:
            self.choose(recorder)
        taken = self.arrival

        def note(name: str) -> Callable[[torch.Tensor], None]:
            def hook(gradient: torch.Tensor) -> None:
                arrived[name] = taken(name, gradient)

            return hook

        leaves = recorder.leaves()
        if recorder.holdings is not None:
            leaves |= recorder.holdings.gathered(recorder.model)
        handles = [
            p.register_hook(note(name))  # type: ignore[no-untyped-call]
            for name, p in leaves.items()
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._arrived.append(arrived)


class Keeper(Sampler):
    """Stores the reference: gradients, parameters, buffers and optimizer state of every step."""

    def __init__(
        self, objective: Callable[[Recorder, Step], Gradients | None] | None = None
    ) -> None:
        super().__init__()
        self.shelf = Shelf()
        self._objective = objective
        self._pending: Kept | None = None
        self._stepped = False

    def gradients(
        self, recorder: Recorder, step: Step, gradients: Gradients, applied: Gradients
    ) -> None:
        self.sample(recorder, step, gradients)
        step.matched = step.index
        kept = {name: None if g is None else self.shelf.keep(g) for name, g in gradients.items()}
        same = {
            name: kept[name]
            if applied[name] is gradients[name]
            else _kept(self.shelf, applied[name])
            for name in applied
        }
        self._pending = Kept(
            kept,
            same,
            {},
            {},
            {},
            shadows_of(recorder, self.shelf.keep),
            release=self.shelf.release,
        )
        if self._objective is not None:
            stated = self._objective(recorder, step)
            if stated is not None:
                step.objective = compare(stated, kept, step)

    def after(self, recorder: Recorder, _step: Step, optimizer: Optimizer) -> None:
        if self._pending is None:
            return
        kept, self._pending = self._pending, None
        kept.after = {name: self.shelf.keep(p) for name, p in recorder.parameters().items()}
        before = (
            recorder.recording.kept[-1].after
            if recorder.recording.kept
            else self._initial(recorder)
        )
        # A framework may take a parameter's storage away, once it has partitioned it (ZeRO stage 3).
        both = [
            n for n, each in kept.after.items() if n in before and before[n].shape == each.shape
        ]
        moved = sums_many([(before[name], kept.after[name]) for name in both])
        kept.moved = {name: each.difference_norm for name, each in zip(both, moved, strict=True)}
        kept.buffers = {name: self.shelf.keep(b) for name, b in recorder.model.named_buffers()}
        kept.state = state_of(recorder, optimizer, self.shelf.keep)
        recorder.recording.kept.append(kept)
        self._stepped = True
        self.shelf.release()

    def fetched(self, recorder: Recorder) -> None:
        """See what the loop itself did to the parameters since the step: copied a master's, averaged them, ...

        Before the first step it may have drawn them anew, or loaded them.
        """
        if self._stepped and recorder.holdings is None:
            self._stepped = False
            done = recorder.recording.kept
            kept = done[-1] if done else recorder.recording.initial
            assert kept is not None
            kept.begins = {
                name: self.shelf.keep(p)
                for name, p in recorder.parameters().items()
                if name in kept.after and not _alike(p.detach(), kept.after[name])
            }

    @staticmethod
    def _initial(recorder: Recorder) -> dict[str, torch.Tensor]:
        return recorder.recording.initial.after if recorder.recording.initial is not None else {}

    def start(self, recorder: Recorder) -> None:
        after = {name: self.shelf.keep(p) for name, p in recorder.parameters().items()}
        buffers = {name: self.shelf.keep(b) for name, b in recorder.model.named_buffers()}
        recorder.recording.initial = Kept({}, {}, after, buffers, {}, {})
        self._stepped = True

    def finish(self, recorder: Recorder) -> None:
        if recorder.recording.kept:
            recorder.recording.kept.append(
                Kept({}, {}, {}, {}, {}, shadows_of(recorder, self.shelf.keep, ended=True))
            )


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether a few coordinates of two tensors are the same: what a loop changes by hand it changes all of."""
    return a.shape == b.shape and torch.equal(
        plain(a).flatten()[:FEW], plain(b).flatten()[:FEW].to(a.dtype)
    )


def _kept(shelf: Shelf, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else shelf.keep(tensor)


def shadows_of(
    recorder: Recorder, keep: Callable[[torch.Tensor], torch.Tensor], *, ended: bool = False
) -> dict[str, torch.Tensor]:
    """Return the loop's own copies of the weights, each as `keep` keeps it."""
    found = shadow_weights(recorder, ended=ended)
    return {name: keep(tensor) for name, tensor in found.items()}


def compare(
    reference: Mapping[str, torch.Tensor | None],
    candidate: Mapping[str, torch.Tensor | None],
    step: Step | None,
) -> dict[str, Sums]:
    """Return the sums of every tensor that both have; note in the step those that one lacks."""
    pairs: list[_Pair] = []
    for name, r in reference.items():
        c = candidate.get(name)
        if r is None and c is None:
            continue
        if (r is None or c is None) and step is not None:
            step.none_mismatch.append(name)
        if r is None:
            assert c is not None
            r = torch.zeros_like(c)  # noqa: PLW2901 - absent counts as zero
        pairs.append((name, r, torch.zeros_like(r) if c is None else c, None))
    return measured(pairs)


_Pair = tuple[str, torch.Tensor, torch.Tensor, "torch.Tensor | None"]


def measured(pairs: Sequence[_Pair]) -> dict[str, Sums]:
    """Measure named pairs, each with the mask of the elements that count; small ones together."""
    found: dict[str, Sums] = dict.fromkeys((name for name, *_ in pairs), Sums())
    whole = []
    for name, reference, candidate, mask in pairs:
        if mask is None or mask.shape != reference.shape:
            whole.append((name, reference, candidate))
        else:
            found[name] = sums(reference, candidate, mask)
    together = sums_many([(reference, candidate) for _, reference, candidate in whole])
    found.update(zip((name for name, *_ in whole), together, strict=True))
    return found
