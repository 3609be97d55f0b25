"""What is counted in the wrong unit: schedulers and their horizons, loaders, the tail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from equivcheck.interventions.base import Intervention

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder
    from equivcheck.recording import Recording


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


class Rates(Intervention):
    """Multiply the learning rates that every step is taken with; what a scheduler makes them from stays.

    Args:
        factor: By what.
    """

    name = "rescale the learning rates"

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._own: list[tuple[dict[str, Any], Any]] = []

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._own = []
        yield

    def before_step(self, _recorder: Recorder, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            if "lr" in group:
                self._own.append((group, group["lr"]))
                group["lr"] = group["lr"] * self._factor

    def after_step(self, _recorder: Recorder, _optimizer: Optimizer) -> None:
        while self._own:
            group, rate = self._own.pop()
            group["lr"] = rate


class Shorten(Intervention):
    """Leave the incomplete last cycle out of both runs."""

    name = "without the tail"
    both = True
    shorter = True
