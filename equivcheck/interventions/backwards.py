"""What is put right at backwards: the weights of micro-batches, and of addends of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.addends import addend_gradients, scale_addend
from equivcheck.interventions.base import Intervention

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder
    from equivcheck.recording import Place


class Reweight(Intervention):
    """Multiply the root gradient of each backward by a factor for its place.

    Args:
        factors: Per cycle, one factor for each micro-step (of each rank): the true weight over the
            weight that a hypothesis predicts.
        names: The parameters whose gradients are concerned; None for all, by way of the root.
    """

    name = "reweight"

    def __init__(
        self, factors: Mapping[int, Sequence[float]], names: frozenset[str] | None = None
    ) -> None:
        self._factors = factors
        self._names = names

    def _factor(self, recorder: Recorder) -> float:
        return recorder.factor(self._factors)

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


class Shrink(Intervention):
    """Let every gradient be too small to be clipped, by whatever clips it, and give it its size back at the step.

    In both runs. All else that a loop does with a gradient keeps to its size: a share of it, an average, a norm that it
    is divided by.

    Attributes:
        FACTOR: A power of two, so that nothing is rounded. Clips are set a few powers of ten from what gradients
            have; what float64 rounds is far smaller.
    """

    name = "shrink"
    both = True
    FACTOR = 2.0**-20

    def root_factor(self, _recorder: Recorder) -> float:
        return self.FACTOR

    def before_step(self, _recorder: Recorder, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(1.0 / self.FACTOR)


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
        if recorder.place() is None:
            return 1.0
        ordinal = ordinal_of(recorder.schedule, recorder.backwards - 1)
        return recorder.factor(self._factors) if ordinal == self._ordinal else 1.0

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
        taken: By role and rank, per backward, the sampled gradient of every addend, by path.
    """

    name = "take addends"

    def __init__(self) -> None:
        self.taken: dict[tuple[str, int], list[dict[tuple[int, ...], dict[str, torch.Tensor]]]] = {}

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
        self.taken.setdefault((recorder.recording.role, recorder.rank), []).append(found)
        yield

    def gathered(self) -> Any:
        return {key: taken for key, taken in self.taken.items() if key[0] == "candidate"}

    def take_back(self, by_rank: Sequence[Any]) -> None:
        for each in by_rank:
            self.taken.update(each)


def ordinal_of(schedule: Sequence[Place], index: int) -> int:
    """Return which backward of its micro-step a backward is."""
    place = schedule[index]
    return sum(
        1
        for each in schedule[:index]
        if each.cycle == place.cycle and each.micro_step == place.micro_step
    )
