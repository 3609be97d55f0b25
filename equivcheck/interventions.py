"""The few things that can be put right in a user's unchanged loop, at the recorder's own hooks.

A cause is proved when putting it right makes the divergence vanish and leaving it wrong does not.
Each intervention
is general: it knows cycles and weights, not faults.

K micro-batches per cycle; a *place* is a micro-step in a cycle.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.addends import addend_gradients, scale_addend
from equivcheck.shadow import shadow_weights

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder
    from equivcheck.recording import Place, Recording


class Intervention:
    """Puts nothing right; the base of those that do.

    Attributes:
        both: The reference is run with it too (couplings, the tail).
        controls_steps: Optimizer steps may be left out, so every step method is wrapped.
        shorter: The last full batch is left out of the run.
        length: What `len(loader)` is to say in the accumulated run, if not the truth.
    """

    name = "nothing"
    both = False
    controls_steps = False
    shorter = False
    length: int | None = None

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        """Surround the run."""
        yield

    def before_fetch(self, recorder: Recorder) -> None:
        """Act before a micro-batch is handed out."""

    def root_factor(self, _recorder: Recorder) -> float:
        """Return the factor for the root gradient of the backward that begins."""
        return 1.0

    @contextmanager
    def around_backward(self, _recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        """Surround one root backward."""
        yield

    def after_backward(self, recorder: Recorder) -> None:
        """Act after a root backward."""

    def allows(self, _kind: str, _recorder: Recorder) -> bool:
        """Return whether a call is carried out."""
        return True

    def left_out(self, kind: str, call: Callable[[], object]) -> None:
        """Hear of a call that was not carried out."""

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        """Act before an optimizer step is looked at."""

    def scheduler_steps(self, _recorder: Recorder) -> int:
        """Return how often a scheduler step is carried out."""
        return 1

    def scheduler_arguments(
        self, _ordinal: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments that a scheduler is made with."""
        return args, kwargs

    def finish(self, recorder: Recorder) -> None:
        """Act when `train` has returned."""


class Reweight(Intervention):
    """Multiply the root gradient of each backward by a factor for its place.

    Args:
        factors: Per cycle, one factor for each micro-step: the true weight over the weight that a
            hypothesis predicts.
        names: The parameters whose gradients are concerned; None for all, by way of the root.
    """

    name = "reweight"

    def __init__(
        self, factors: Mapping[int, Sequence[float]], names: frozenset[str] | None = None
    ) -> None:
        self._factors = factors
        self._names = names

    def _factor(self, recorder: Recorder) -> float:
        place = recorder.place()
        if place is None:
            return 1.0
        factors = self._factors.get(place.cycle, ())
        return factors[place.micro_step] if place.micro_step < len(factors) else 1.0

    def root_factor(self, recorder: Recorder) -> float:
        return self._factor(recorder) if self._names is None else 1.0

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        factor = self._factor(recorder)
        handles = []
        if self._names is not None and factor != 1.0:
            for parameter in recorder.gradient_holders():
                if recorder.names.get(id(parameter)) in self._names:
                    hook = parameter.register_hook(lambda g: g * factor)  # type: ignore[no-untyped-call]
                    handles.append(hook)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Defer(Intervention):
    """Leave out calls of some kinds inside a cycle; those at its end stay.

    Args:
        kinds: Of zero_grad, clip, unscale, scheduler, scaler.
    """

    name = "defer"

    def __init__(self, *kinds: str) -> None:
        self._kinds = kinds

    def allows(self, kind: str, recorder: Recorder) -> bool:
        return kind not in self._kinds or not recorder.inside()


class Postpone(Defer):
    """Carry out at the end of the cycle, once, what is called inside it."""

    name = "postpone"

    def __init__(self, *kinds: str) -> None:
        super().__init__(*kinds)
        self._waiting: Callable[[], object] | None = None

    def left_out(self, kind: str, call: Callable[[], object]) -> None:
        if kind in self._kinds:
            self._waiting = call

    def after_backward(self, recorder: Recorder) -> None:
        place = recorder.place()
        if place is not None and place.last and self._waiting is not None:
            call, self._waiting = self._waiting, None
            call()


class Ration(Defer):
    """Leave out calls of one kind inside a cycle, and at its end those that are too many.

    Args:
        kind: As for Defer.
        most: Calls that the full-batch run makes per cycle.
    """

    name = "ration"

    def __init__(self, kind: str, most: int) -> None:
        super().__init__(kind)
        self._kind = kind
        self._most = most
        self._made: dict[int, int] = {}

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._made = {}
        yield

    def allows(self, kind: str, recorder: Recorder) -> bool:
        if not super().allows(kind, recorder):
            return False
        if kind != self._kind or not recorder.backwards:
            return True
        self._made[recorder.backwards] = self._made.get(recorder.backwards, 0) + 1
        return self._made[recorder.backwards] <= self._most


class Before(Intervention):
    """Start every optimizer step from the parameters and the state that the full batch starts it from."""

    name = "state before the step"
    both = True

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], list[torch.Tensor]] = {}
        self._count: dict[str, int] = {}

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._count = {}
        yield

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        key = recorder.key_of(optimizer)
        index = self._count.get(key, 0)
        self._count[key] = index + 1
        tensors = [p.detach() for p in recorder.gradient_holders()]
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            entries = optimizer.state.get(parameter, {})
            tensors += [
                each.detach()
                for _, each in sorted(entries.items())
                if isinstance(each, torch.Tensor)
            ]
        with torch.no_grad():
            if recorder.recording.role == "reference":
                self._known[key, index] = [each.clone() for each in tensors]
            elif recorder.recording.role == "candidate":
                for mine, theirs in zip(tensors, self._known.get((key, index), []), strict=False):
                    if mine.shape == theirs.shape:
                        mine.copy_(theirs)


class Hold(Intervention):
    """Between two backwards of a cycle, gradients stay as the first one left them."""

    name = "hold"

    def __init__(self) -> None:
        self._held: list[tuple[torch.Tensor, torch.Tensor | None]] = []

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


class Fresh(Intervention):
    """Start every cycle without gradients: what earlier cycles left is dropped."""

    name = "fresh"

    @contextmanager
    def around_backward(self, recorder: Recorder, _outputs: Sequence[Any]) -> Iterator[None]:
        place = recorder.place()
        first = recorder.backwards == 1 or (
            place is not None and recorder.schedule[recorder.backwards - 2].cycle != place.cycle
        )
        if first:
            for parameter in recorder.gradient_holders():
                parameter.grad = None
        yield


class Retime(Intervention):
    """Step exactly at the end of every cycle: steps inside one are left out, missing ones are made.

    What belongs to a step that is left out (zeroing, scheduler, scaler, between it and the next
    backward) is left out with it.

    Args:
        ends: Counts of backwards after which the user's own loop steps anyway.
    """

    name = "retime"
    controls_steps = True

    def __init__(self, ends: set[int]) -> None:
        self._ends = ends
        self._left_out_at = -1

    def allows(self, kind: str, recorder: Recorder) -> bool:
        inside = recorder.inside()
        if kind == "step":
            if inside:
                self._left_out_at = recorder.backwards
            return not inside
        if kind in {"zero_grad", "scheduler", "scaler", "unscale", "clip"}:
            return not (inside and (self._left_out_at == recorder.backwards or kind == "zero_grad"))
        return True

    def after_backward(self, recorder: Recorder) -> None:
        place = recorder.place()
        if place is None or not place.last or recorder.backwards in self._ends:
            return
        for reference in list(recorder.alive.values()) or _optimizers(recorder):
            optimizer = reference()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()


def _optimizers(recorder: Recorder) -> list[Any]:
    """Return optimizers that have not stepped yet, from the frames of the running loop."""
    import gc  # noqa: PLC0415 - only when the loop never stepped before

    # Those of earlier runs may not have been collected yet: they hold other parameters.
    return [
        functools.partial(lambda o: o, each)
        for each in gc.get_objects()
        if isinstance(each, Optimizer)
        and any(id(p) in recorder.names for group in each.param_groups for p in group["params"])
    ]


class Rewind(Intervention):
    """Set state back to the cycle's start at each micro-batch: it then advances once per cycle.

    Args:
        what: Any of parameters, state, buffers, shadows.
    """

    name = "rewind"

    def __init__(self, *what: str) -> None:
        self._what = what
        self._saved: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._entries: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._done = -1

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        # Before every forward: a loop may have fetched the whole cycle long before.
        handle = recorder.model.register_forward_pre_hook(lambda *_: self._rewind(recorder))
        try:
            yield
        finally:
            handle.remove()

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
                for entries, values in self._entries:
                    # Fresh copies each time: the loop may change in place what is put back.
                    entries.update(
                        {
                            k: v.clone() if isinstance(v, torch.Tensor) else v
                            for k, v in values.items()
                        }
                    )
            else:
                self._save(recorder)

    def _save(self, recorder: Recorder) -> None:
        tensors: list[torch.Tensor] = []
        self._entries = []
        if "parameters" in self._what:
            tensors += [p.detach() for p in recorder.gradient_holders()]
        if "buffers" in self._what:
            tensors += [b.detach() for b in recorder.model.buffers()]
        if "state" in self._what:
            for reference in recorder.alive.values():
                optimizer = reference()
                for entries in () if optimizer is None else optimizer.state.values():
                    tensors += [
                        each.detach() for each in entries.values() if isinstance(each, torch.Tensor)
                    ]
                    numbers = {k: v for k, v in entries.items() if isinstance(v, (int, float))}
                    self._entries.append((entries, numbers))
        if "shadows" in self._what:
            shadow_weights(recorder)
            for holder in recorder.shadow_holders.values():
                tensors += self._holder(holder)
        self._saved = [(tensor, tensor.clone()) for tensor in tensors]

    def _holder(self, holder: Any) -> list[torch.Tensor]:
        if isinstance(holder, torch.nn.Module):
            return [each.detach() for each in (*holder.parameters(), *holder.buffers())]
        if isinstance(holder, dict):
            self._entries.append((holder, {k: v.clone() for k, v in holder.items()}))
            return []
        return [each for each in holder if isinstance(each, torch.Tensor)]


class Repeat(Intervention):
    """Carry out every scheduler step several times: the horizon was counted in other units.

    Args:
        times: Scheduler steps for one of the loop's own.
    """

    name = "recount"

    def __init__(self, times: int) -> None:
        self._times = times

    def scheduler_steps(self, _recorder: Recorder) -> int:
        return self._times


class Construct(Intervention):
    """Make schedulers with the numbers that the full-batch run made them with.

    Args:
        reference: The recording whose schedulers are copied.
    """

    name = "recount"

    def __init__(self, reference: Recording) -> None:
        self._made = reference.schedulers

    def scheduler_arguments(
        self, ordinal: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if ordinal >= len(self._made):
            return args, kwargs
        told = self._made[ordinal]["arguments"]
        rest = tuple(told.get(str(i), value) for i, value in enumerate(args[1:]))
        return (*args[:1], *rest), {key: told.get(key, value) for key, value in kwargs.items()}


class Length(Intervention):
    """Let `len(loader)` say the number of optimizer steps.

    Args:
        length: What it says.
    """

    name = "recount"

    def __init__(self, length: int) -> None:
        self.length = length


class Shorten(Intervention):
    """Leave the incomplete last cycle out of both runs."""

    name = "without the tail"
    both = True
    shorter = True


class Restitute(Intervention):
    """Add to the gradients what a hypothesis says is missing from them, just before the step.

    Args:
        missing: Per backward count at the step, and per parameter, the gradient to add (full
            tensors).
    """

    name = "restitute"

    def __init__(self, missing: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        self._missing = missing

    def before_step(self, recorder: Recorder, optimizer: Optimizer) -> None:
        missing = self._missing.get(recorder.backwards)
        if missing is None:
            return
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    extra = missing.get(recorder.name_of(parameter, optimizer))
                    if extra is None:
                        continue
                    extra = extra.view(parameter.shape).to(parameter.dtype)
                    parameter.grad = (
                        extra.clone() if parameter.grad is None else parameter.grad + extra
                    )


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


class UnscaleFirst(Intervention):
    """Remove the loss scale from the gradients before a clip sees them."""

    name = "unscale before the clip"

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        recorder.unscale_before_clip = True
        yield


class Addend(Intervention):
    """Multiply the gradient of one addend of the loss by a factor for its place.

    Args:
        ordinal: Which backward of a micro-step; a loop may have several.
        path: Which addend, as the path from the root through the additions; empty for the whole
            root.
        factors: Per cycle, one factor for each micro-step.
    """

    name = "reweight an addend"

    def __init__(
        self, ordinal: int, path: tuple[int, ...], factors: Mapping[int, Sequence[float]]
    ) -> None:
        self._ordinal = ordinal
        self._path = path
        self._factors = factors

    def _factor(self, recorder: Recorder) -> float:
        place = recorder.place()
        if place is None or ordinal_of(recorder.schedule, recorder.backwards - 1) != self._ordinal:
            return 1.0
        factors = self._factors.get(place.cycle, ())
        return factors[place.micro_step] if place.micro_step < len(factors) else 1.0

    def root_factor(self, recorder: Recorder) -> float:
        return 1.0 if self._path else self._factor(recorder)

    @contextmanager
    def around_backward(self, recorder: Recorder, outputs: Sequence[Any]) -> Iterator[None]:
        factor = self._factor(recorder) if self._path else 1.0
        handle = scale_addend(outputs[0], self._path, factor) if factor != 1.0 else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()


class Addends(Intervention):
    """Takes, at every backward, the gradient of each addend of the loss alone. Changes nothing.

    Attributes:
        taken: Per backward, the sampled gradient of every addend, by path.
    """

    name = "take addends"

    def __init__(self) -> None:
        self.taken: dict[str, list[dict[tuple[int, ...], dict[str, torch.Tensor]]]] = {}

    @contextmanager
    def around_backward(self, recorder: Recorder, outputs: Sequence[Any]) -> Iterator[None]:
        parameters = {recorder.names[id(p)]: p for p in recorder.gradient_holders()}
        found: dict[tuple[int, ...], dict[str, torch.Tensor]] = {}
        with recorder.paused():
            for path, gradients in addend_gradients(outputs[0], list(parameters.values())).items():
                found[path] = {
                    name: recorder.observer.take(name, g)
                    for name, g in zip(parameters, gradients, strict=True)
                    if g is not None
                }
        self.taken.setdefault(recorder.recording.role, []).append(found)
        yield


def ordinal_of(schedule: Sequence[Place], index: int) -> int:
    """Return which backward of its micro-step a backward is."""
    place = schedule[index]
    return sum(
        1
        for each in schedule[:index]
        if each.cycle == place.cycle and each.micro_step == place.micro_step
    )
