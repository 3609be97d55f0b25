"""Gradients, parameters and other state that are put back to what they should be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.optim import Optimizer

from equivcheck.interventions.base import Intervention
from equivcheck.parts import is_distributed
from equivcheck.shadow import as_tensor, shadow_holders, shadow_weights, untrained

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Hold(Intervention):
    """Between two backwards of a cycle, gradients stay as the first one left them."""

    name = "hold"

    def __init__(self) -> None:
        self._held: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        try:
            yield
        finally:
            self._held = []

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        place = recorder.place()
        if place is not None and recorder.backwards > 1:
            before = recorder.schedule[recorder.backwards - 2]
            if before.cycle == place.cycle and not before.last:
                with torch.no_grad():
                    for parameter, gradient in self._held:
                        if gradient is None:
                            parameter.grad = None
                        elif parameter.grad is None:
                            parameter.grad = gradient.clone()
                        else:
                            parameter.grad.copy_(gradient)
        yield

    def after_backward(self, recorder: Recorder) -> None:
        with torch.no_grad():
            self._held = [
                (p, None if p.grad is None else p.grad.detach().clone())
                for p in recorder.gradient_holders()
            ]


class Fresh(Intervention):
    """Start every cycle without gradients: what earlier cycles left is dropped.

    In runs that are not cut into cycles (full batches, micro-batches each with a step of its own), what follows a step.
    """

    name = "fresh"

    def __init__(self) -> None:
        self._stepped = False

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._stepped = False
        yield

    def before_step(self, _recorder: Recorder, _optimizer: Optimizer) -> None:
        self._stepped = True

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        place = recorder.place()
        if place is None:
            first = recorder.backwards == 1 or self._stepped
        else:
            before = recorder.schedule[recorder.backwards - 2] if recorder.backwards > 1 else None
            first = before is None or before.cycle != place.cycle
        self._stepped = False
        if first:
            for parameter in recorder.gradient_holders():
                parameter.grad = None
        yield


T = TypeVar("T")


class AtStep(Intervention, Generic[T]):
    """Changes the gradients that a step takes: before the clip that comes just before it, or else before the step.

    Args:
        changes: Per parameter, and per number of its own step (from 0), how many backwards came before that step (on
            rank 0; another rank may have made fewer), and what to change by.
    """

    def __init__(self, changes: Mapping[str, Mapping[int, tuple[int, T]]]) -> None:
        self._changes = changes
        self._made: dict[str, int] = {}
        self._done: set[tuple[str, int]] = set()

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._made, self._done = {}, set()
        yield

    def before_clip(self, recorder: Recorder, parameters: Sequence[torch.Tensor]) -> None:
        for parameter in parameters:
            self._apply(recorder, recorder.names.get(id(parameter), ""), parameter)

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name = recorder.name_of(parameter, optimizer)
                self._apply(recorder, name, parameter, steps=True)
                self._made[name] = self._made.get(name, 0) + 1

    def _apply(
        self, recorder: Recorder, name: str, parameter: torch.Tensor, *, steps: bool = False
    ) -> None:
        number = self._made.get(name, 0)
        backwards, change = self._changes.get(name, {}).get(number, (-1, None))
        now = backwards == recorder.backwards or (recorder.rank > 0 and (steps or _ends(recorder)))
        if change is None or not now or (name, number) in self._done:
            return
        self._done.add((name, number))
        with torch.no_grad():
            self._change(parameter, change)

    def _change(self, parameter: torch.Tensor, change: T) -> None:
        raise NotImplementedError


def _ends(recorder: Recorder) -> bool:
    place = recorder.place()
    return place is not None and place.last


class Restitute(AtStep[torch.Tensor]):
    """Add to the gradients of a step what a hypothesis says is missing from them.

    Args:
        changes: As for every change at a step.
        restored: Micro-steps, by cycle, that are given with their true weight, whatever the others have.
    """

    name = "restitute"

    def __init__(
        self,
        changes: Mapping[str, Mapping[int, tuple[int, torch.Tensor]]],
        restored: Mapping[int, Collection[int]] | None = None,
    ) -> None:
        super().__init__(changes)
        self.restored = restored or {}

    def _change(self, parameter: torch.Tensor, change: torch.Tensor) -> None:
        if change.numel() != parameter.numel() or is_distributed(parameter):
            return  # Of a part, what is missing is not known.
        extra = change.view(parameter.shape).to(parameter.device, parameter.dtype)
        parameter.grad = extra.clone() if parameter.grad is None else parameter.grad + extra


class Supplement(Intervention):
    """Add to the gradients, once so many backwards have run, what a hypothesis says is missing from them then.

    Args:
        missing: By count of backwards, what to add to the gradient of each parameter.
        losses: By the same count, what to add to the loss that a closure returns.
    """

    name = "supplement"

    def __init__(
        self,
        missing: Mapping[int, Mapping[str, torch.Tensor]],
        losses: Mapping[int, float] | None = None,
    ) -> None:
        self._missing = missing
        self._losses = losses or {}

    def after_backward(self, recorder: Recorder) -> None:
        missing = self._missing.get(recorder.backwards)
        if missing is None:
            return
        evaluated = recorder.backward.evaluated
        if recorder.backwards in self._losses and evaluated and evaluated[-1][0]:
            loss, factor = evaluated[-1]
            evaluated[-1] = loss, factor + self._losses[recorder.backwards] / loss
        with torch.no_grad():
            for parameter in recorder.gradient_holders():
                extra = missing.get(recorder.names.get(id(parameter), ""))
                if extra is None or extra.numel() != parameter.numel():
                    continue  # Of a sample of coordinates, what is missing is not known.
                extra = extra.view(parameter.shape).to(parameter.device, parameter.dtype)
                if parameter.grad is None:
                    parameter.grad = extra.clone()
                else:
                    parameter.grad += extra


class EvaluateOnce(Intervention):
    """Let an optimizer with a closure step on its first evaluation alone, in both runs."""

    name = "one evaluation of the closure"
    both = True

    def before_step(self, _recorder: Recorder, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if "max_iter" in group:
                group.update(max_iter=1, max_eval=1, line_search_fn=None)


class Rescale(AtStep[float]):
    """Multiply the gradients of a step by a factor: where no backward is seen to be reweighted."""

    name = "rescale at the step"

    def _change(self, parameter: torch.Tensor, change: float) -> None:
        if parameter.grad is not None:
            parameter.grad = parameter.grad * change


class ZerosToNone(Intervention):
    """Give the optimizer no gradient, instead of zeros, for parameters that took no part."""

    name = "none for zeros"

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if recorder.name_of(parameter, optimizer) in self._names:
                    parameter.grad = None


class Before(Intervention):
    """Start every optimizer step from the parameters and the state that the full batch starts it from."""

    name = "state before the step"
    both = True

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[torch.Tensor], list[dict[str, Any]]]] = {}
        self._count: dict[str, int] = {}

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._count = {}
        yield

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        name = recorder.key_of(optimizer)
        key = (recorder.pairing(), name, self._count.get(name, 0))
        self._count[name] = key[2] + 1
        tensors = [p.detach() for p in recorder.gradient_holders()]
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            entries = optimizer.state.get(parameter, {})
            tensors += [
                each.detach()
                for _, each in sorted(entries.items())
                if isinstance(each, torch.Tensor)
            ]
        counts = [*optimizer.param_groups, *optimizer.state.values()]
        with torch.no_grad():
            if recorder.recording.role == "reference":
                known = [each.clone() for each in tensors]
                self._known[key] = known, [_counts(each) for each in counts]
            elif recorder.recording.role == "candidate" and key in self._known:
                known, numbers = self._known[key]
                for mine, theirs in zip(tensors, known, strict=False):
                    if mine.shape == theirs.shape:
                        mine.copy_(theirs)
                for entries, values in zip(counts, numbers, strict=False):
                    entries.update(values)


class StillBuffers(Intervention):
    """Leave every buffer as it was at the start, in both runs: no forward advances it."""

    name = "buffers held still"
    both = True

    def __init__(self) -> None:
        self._start: list[torch.Tensor] = []

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        self._start = [buffer.detach().clone() for buffer in recorder.model.buffers()]
        yield

    def before_step(self, recorder: Recorder, _optimizer: Optimizer) -> None:
        with torch.no_grad():
            for buffer, start in zip(recorder.model.buffers(), self._start, strict=True):
                if buffer.shape == start.shape:
                    buffer.detach().copy_(start)


def _numbers(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entries.items() if isinstance(value, (int, float))}


def _counts(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an optimizer that are not learning rates, which are the scheduler's."""
    return {key: value for key, value in _numbers(entries).items() if "lr" not in key}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


class Rewind(Intervention):
    """Set state back to the cycle's start at each micro-batch: it then advances once per cycle.

    Args:
        what: Any of parameters, state, buffers, shadows, and counts: numbers of the objects that hold the shadows.
    """

    name = "rewind"

    def __init__(self, *what: str) -> None:
        self._what = what
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._buffers: dict[str, torch.Tensor] = {}
        self._entries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._replaced: dict[str, dict[Any, Any]] = {}
        self._done = -1

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        self._done = -1
        # Before every forward: a loop may have fetched the whole cycle long before.
        handle = recorder.model.register_forward_pre_hook(lambda *_: self._rewind(recorder))
        try:
            yield
        finally:
            handle.remove()
            self._saved, self._entries, self._buffers, self._replaced = [], [], {}, {}

    def before_fetch(self, recorder: Recorder) -> None:
        self._rewind(recorder)

    def _rewind(self, recorder: Recorder) -> None:
        if recorder.backwards == self._done:
            return
        self._done = recorder.backwards
        with torch.no_grad():
            if recorder.inside():
                for tensor, value in self._saved:
                    tensor.copy_(value)
                # By name: a forward may have put a new tensor in a buffer's place.
                for name, buffer in recorder.model.named_buffers():
                    if name in self._buffers and self._buffers[name].shape == buffer.shape:
                        buffer.detach().copy_(self._buffers[name])
                # By name, too: a loop may have put a new dictionary in the place of the one that was saved.
                if self._replaced:
                    shadow_weights(recorder)
                for name, saved in self._replaced.items():
                    # What it holds need not look like the weights now: FSDP has them whole before a forward.
                    holder = recorder.shadow_holders.get(name)
                    if isinstance(holder, dict):
                        holder.update({k: _copied(v) for k, v in saved.items()})
                for entries, values in self._entries:
                    # Fresh copies each time: the loop may change in place what is put back.
                    entries.update({k: _copied(v) for k, v in values.items()})
            else:
                self._save(recorder)

    def _save(self, recorder: Recorder) -> None:
        tensors: list[torch.Tensor] = []
        self._entries = []
        if "parameters" in self._what:
            tensors += [p.detach() for p in recorder.gradient_holders()]
        if "buffers" in self._what:
            self._buffers = {n: b.detach().clone() for n, b in recorder.model.named_buffers()}
        if "state" in self._what:
            for reference in recorder.alive.values():
                optimizer = reference()
                for entries in () if optimizer is None else optimizer.state.values():
                    tensors += [
                        each.detach() for each in entries.values() if isinstance(each, torch.Tensor)
                    ]
                    self._entries.append((entries, _numbers(entries)))
                for group in [] if optimizer is None else optimizer.param_groups:
                    self._entries.append((group, _counts(group)))
        if "shadows" in self._what:
            holders = shadow_holders(recorder)
            if "counts" in self._what:
                owners = {id(each): each for each in recorder.shadow_owners.values()}
                self._entries += [(vars(each), _numbers(vars(each))) for each in owners.values()]
            self._replaced = {}
            for name, holder in holders.items():
                tensors += self._holder(name, holder)
            tensors += [parameter.detach() for _, parameter in untrained(recorder)]
        self._saved = [(tensor, tensor.clone()) for tensor in tensors]

    def _holder(self, name: str, holder: Any) -> list[torch.Tensor]:
        if isinstance(holder, torch.nn.Module):
            return [each.detach() for each in (*holder.parameters(), *holder.buffers())]
        if isinstance(holder, dict):
            self._replaced[name] = {k: _copied(v) for k, v in holder.items()}
            return []
        return [tensor for each in holder if (tensor := as_tensor(each)) is not None]
