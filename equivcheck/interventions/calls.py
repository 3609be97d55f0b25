"""Calls that are left out, postponed or made: zero_grad, clip, unscale, scheduler, scaler, step."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from equivcheck.interventions.base import Intervention
from equivcheck.recording import closes

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


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

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._waiting = None
        yield

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


class Retime(Intervention):
    """Step exactly at the end of every cycle: steps inside one are left out, missing ones are made.

    What belongs to a step that is left out is left out with it: unscaling and clips before it, zeroing, scheduler and
    scaler between it and the next backward.

    Args:
        ends: Counts of backwards after which the user's own loop steps anyway, at the end of a cycle.
        others: Counts of backwards after which it steps inside of one.
    """

    name = "retime"
    controls_steps = True

    def __init__(self, ends: Collection[int], others: Collection[int] = ()) -> None:
        self._ends = ends
        self._others = others
        self._left_out_at = -1

    @contextmanager
    def installed(self, _recorder: Recorder) -> Iterator[None]:
        self._left_out_at = -1
        yield

    def allows(self, kind: str, recorder: Recorder) -> bool:
        inside = recorder.inside() and not closes(recorder.schedule, recorder.backwards - 1)
        if kind == "step":
            if inside:
                self._left_out_at = recorder.backwards
            return not inside
        if kind in {"unscale", "clip"} and recorder.backwards in self._others:
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
    # Those of earlier runs may not have been collected yet: they hold other parameters.
    return [
        functools.partial(lambda o: o, each)
        for each in gc.get_objects()
        if issubclass(type(each), Optimizer)  # isinstance would wake lazy and deprecated objects
        and any(id(p) in recorder.names for group in each.param_groups for p in group["params"])
    ]


class UnscaleFirst(Intervention):
    """Remove the loss scale from the gradients before a clip sees them.

    Args:
        by: What the loop itself multiplies its loss with, where no scaler does.
    """

    name = "unscale before the clip"

    def __init__(self, by: float = 1.0) -> None:
        self._by = by

    @contextmanager
    def installed(self, recorder: Recorder) -> Iterator[None]:
        recorder.clips.unscale_first = True
        recorder.clips.hand_scale = self._by
        yield
