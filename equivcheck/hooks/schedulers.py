"""Schedulers: what they are made with, and their steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.optim import lr_scheduler

from equivcheck.hooks.base import Hooks, replace, subclasses

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Schedulers(Hooks):
    """Watches each scheduler class of its own `step`: one that calls another's counts once."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._depth = 0
        self._watched: set[type] = set()

    def install(self, stack: ExitStack) -> None:
        classes: list[Any] = list(dict.fromkeys(subclasses(lr_scheduler.LRScheduler)))
        for each in classes:
            if each in self._watched:
                continue
            self._watched.add(each)
            if "step" in vars(each):
                replace(stack, each, "step", self._step(each.step))
            if "__init__" in vars(each):
                replace(stack, each, "__init__", self._init(each.__init__))

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if self._depth or getattr(scheduler, "_is_initial", False):
                return original(scheduler, *args, **kwargs)
            self.recorder.note("scheduler", scheduler=type(scheduler).__name__)
            if not self.recorder.allowed("scheduler"):
                return None
            self._depth += 1
            result = None
            try:
                for _ in range(
                    max(each.scheduler_steps(self.recorder) for each in self.recorder.interventions)
                    if self.recorder.interventions
                    else 1
                ):
                    result = original(scheduler, *args, **kwargs)
            except ValueError:
                # Micro-batches alone make more steps than the schedule was made for; they need no rate.
                if self.recording.role != "pieces":
                    raise
            finally:
                self._depth -= 1
            return result

        return step

    def _init(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def init(scheduler: Any, *args: Any, **kwargs: Any) -> None:
            if self._depth or type(scheduler).__init__ is not init:
                original(scheduler, *args, **kwargs)
                return
            record = {"scheduler": type(scheduler).__name__, "arguments": _plain(args[1:], kwargs)}
            ordinal = len(self.recording.schedulers)
            self.recording.schedulers.append(record)
            for each in self.recorder.interventions:
                args, kwargs = each.scheduler_arguments(ordinal, args, kwargs)
            self._depth += 1
            try:
                original(scheduler, *args, **kwargs)
            finally:
                self._depth -= 1

        return init


def _plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers among a scheduler's arguments, by position or name."""
    named = {str(i): value for i, value in enumerate(args)} | kwargs
    kinds = (int, float, str, bool, list, tuple)
    return {key: value for key, value in named.items() if isinstance(value, kinds)}
