"""What the processes of a script keep: the full batch's state in files, each backward's own contribution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from equivcheck.attach.store import step_name, write_kept
from equivcheck.comparers import Comparer, Perturbed
from equivcheck.differences import dense
from equivcheck.observe import Glimpse, Gradients, Keeper, Sampler
from equivcheck.recording import Recording, Step
from equivcheck.sampled import Sampled, Tray, packed
from equivcheck.states import set_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from equivcheck.recorder import Recorder

Contributions = list[Mapping[str, torch.Tensor]]


class Writer(Keeper):
    """Keeps the full-batch run in one file per optimizer step, so that other processes can be set to its state.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def start(self, recorder: Recorder) -> None:
        super().start(recorder)
        assert recorder.recording.initial is not None
        write_kept(self._folder, "initial", recorder.recording.initial)

    def after(self, recorder: Recorder, step: Step, optimizer: Optimizer) -> None:
        before = len(recorder.recording.kept)
        super().after(recorder, step, optimizer)
        if len(recorder.recording.kept) > before:
            self._write(recorder, before)

    def finish(self, recorder: Recorder) -> None:
        before = len(recorder.recording.kept)
        super().finish(recorder)
        if len(recorder.recording.kept) > before:
            self._write(recorder, before)
        self.shelf.close()

    def _write(self, recorder: Recorder, index: int) -> None:
        kept = recorder.recording.kept[index]
        write_kept(self._folder, step_name(index), kept)
        # Only the parameters of the last step are looked at again: how far the next one moves them.
        kept.gradients, kept.applied, kept.buffers, kept.state, kept.shadows = {}, {}, {}, {}, {}
        if index:
            recorder.recording.kept[index - 1].after = {}


class Follower(Comparer):
    """Compares a process with the full batch, by its samples or as an earlier run of it has shown.

    Attributes:
        match_by: Per optimizer step, the full batch's; None where samples tell.
    """

    def __init__(
        self, reference: Recording, *, native: bool = False, contributions: bool = False
    ) -> None:
        super().__init__(reference, native=native, contributions=contributions)
        self.match_by: list[int | None] | None = None

    def _match(self, step: Step) -> None:
        if self.match_by is not None:
            known = step.index < len(self.match_by)
            step.matched = self.match_by[step.index] if known else None
        else:
            super()._match(step)


class Shaken(Perturbed, Follower):
    """A control whose signs may be chosen.

    Args:
        reference: The recording that was kept.
        which: Chooses the signs of the roundings.
    """

    def __init__(self, reference: Recording, which: int = 0) -> None:
        super().__init__(reference)
        self._seed = which * 1_000_000


class Contributor(Follower):
    """Compares, and takes what each backward adds to the gradients, as the pieces of the cycle.

    Args:
        reference: The recording that was kept.
        contributions: Filled with one entry per root backward, at the sampled coordinates, float64.
    """

    def __init__(
        self, reference: Recording, contributions: Contributions, *, native: bool = False
    ) -> None:
        super().__init__(reference, native=native, contributions=True)
        self._taken = contributions
        self._is_native = native

    def enter(self, recorder: Recorder, cycle: int) -> None:
        """Set the model to the state that a cycle starts from, before each of its micro-batches."""
        timeline = recorder.recording.timeline
        if self._is_native or cycle < 0 or (timeline and timeline[-1].kind == "fetch"):
            return  # A graph that has not gone backward yet was made from the state as it is.
        kept = self._reference.kept[cycle - 1] if cycle > 0 else self._reference.initial
        if kept is not None:
            set_state(recorder, None, kept)

    @contextmanager
    def contributions(self, recorder: Recorder) -> Iterator[None]:
        with super().contributions(recorder):
            yield
        self._taken.append(self._arrived[-1])

    def returned(self, recorder: Recorder, inputs: Any, result: Any) -> None:
        super().returned(recorder, inputs, result)
        self._taken.append(self._arrived[-1])


class Watcher(Sampler):
    """Takes a fixed sample of coordinates of everything, and changes nothing.

    Args:
        contributions: Filled with one entry per root backward.
        after: Filled with one entry per optimizer step: the parameters after it.
    """

    def __init__(self, contributions: Contributions, after: list[Sampled]) -> None:
        super().__init__()
        self._taken = contributions
        self._after = after
        self._tray = Tray()
        self._looked: dict[tuple[str, str], torch.Tensor] = {}

    def gradients(
        self,
        recorder: Recorder,
        step: Step,
        gradients: Mapping[str, torch.Tensor | Glimpse | None],
        _applied: Gradients,
    ) -> None:
        self.choose(recorder)
        whole = {name: g for name, g in gradients.items() if isinstance(g, torch.Tensor)}
        norms = dict(zip(whole, _norms(list(whole.values())), strict=True))
        taken: dict[str, torch.Tensor | None] = {}
        for name, gradient in gradients.items():
            if isinstance(gradient, Glimpse):
                taken[name], norms[name] = gradient.values, gradient.norm
            else:
                taken[name] = None if gradient is None else self._look("step", name, gradient)
        step.sample = packed(taken, self._tray)
        step.norm = math.hypot(*map(float, norms.values()))
        step.finite = math.isfinite(step.norm)

    def snapshots(
        self, recorder: Recorder, parameters: Sequence[torch.Tensor]
    ) -> list[torch.Tensor | Glimpse]:
        self.choose(recorder)
        found = [p.grad.detach() for p in parameters if p.grad is not None]
        names = [recorder.names.get(id(p)) for p in parameters]
        return [
            # Which coordinates count is not known before a parameter has a name.
            gradient.clone() if name is None else Glimpse(self._look("clip", name, gradient), norm)
            for name, gradient, norm in zip(names, found, _norms(found), strict=True)
        ]

    def after(self, recorder: Recorder, _step: Step, _optimizer: Optimizer) -> None:
        found = {name: self._look("after", name, p) for name, p in recorder.parameters().items()}
        self._after.append(packed(found, self._tray))

    def arrival(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        return self._look("arrival", name, gradient)

    def _look(self, occasion: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sampled coordinates of one parameter's tensor until the next look on the same occasion."""
        chosen = self._chosen.get(name)
        flat = dense(tensor.detach()).flatten()
        count = flat.numel() if chosen is None else len(chosen)
        found = self._looked.get((occasion, name))
        if found is None or found.dtype != flat.dtype or len(found) != count:
            found = self._looked[occasion, name] = self._tray.empty(count, flat.dtype)
        if chosen is None or flat.device.type != "cpu":
            return found.copy_(flat if chosen is None else flat[chosen])
        return torch.index_select(flat, 0, chosen, out=found)

    @contextmanager
    def contributions(self, recorder: Recorder) -> Iterator[None]:
        try:
            with self.arriving(recorder):
                yield
        finally:
            self._taken.append(packed(self._arrived.pop(), self._tray))


def _norms(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the L2 norm of every gradient, a tensor without dimensions; not finite only where the gradient is not.

    They are shown, and nothing is judged by them but whether all is finite: the gradients' own dtype will do, as long
    as the squares stay in its range.
    """
    alike = len({(type(g), g.dtype, g.device) for g in gradients}) == 1
    if alike and type(gradients[0]) is torch.Tensor and gradients[0].dtype in _WIDE:
        found = list(torch._foreach_norm(gradients))  # noqa: SLF001 - what torch's own clip calls
    else:
        found = [_norm(g) for g in gradients]
    return [
        each if bool(torch.isfinite(each)) else _norm(gradient)
        for each, gradient in zip(found, gradients, strict=True)
    ]


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(dense(gradient), dtype=torch.float64)
    return found


_WIDE = {torch.float32, torch.float64}
