"""Optimizer steps: what each consumed, the gradients it takes, and the state before and after it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from equivcheck.differences import dense
from equivcheck.errors import StepError
from equivcheck.hooks.base import Hooks, number, quiet, replace, subclasses
from equivcheck.hooks.roots import reweighted
from equivcheck.recording import Step

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Steps(Hooks):
    """Watches every torch optimizer, and lets the observer look; a closure is wrapped."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self._open: dict[int, Step] = {}
        self._stepping: dict[int, set[int]] = {}
        self._first_backward: dict[str, int] = {}
        self._controlled: set[type] = set()
        self._untaken: set[int] = set()

    def install(self, stack: ExitStack) -> None:
        stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
        add = self._add_param_group(Optimizer.add_param_group)
        replace(stack, Optimizer, "add_param_group", add)
        self.install_controls(stack)

    def install_controls(self, stack: ExitStack) -> None:
        """Let interventions leave steps out, of optimizer classes that are not known to be watched yet."""
        if not any(each.controls_steps for each in self.recorder.interventions):
            return
        classes: list[Any] = list(dict.fromkeys(subclasses(Optimizer)))
        for each in classes:
            if each is not Optimizer and "step" in vars(each) and each not in self._controlled:
                self._controlled.add(each)
                replace(stack, each, "step", self._step(each.step))

    def close(self) -> None:
        self._open.clear()

    @property
    def open_count(self) -> int:
        """Steps that have begun and not ended: a closure is being evaluated."""
        return len(self._open)

    def first_backward(self, key: str) -> int:
        """Return the count of backwards at an optimizer's previous step."""
        return self._first_backward.get(key, 0)

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if not self.recorder.is_paused and not self.recorder.allowed("step"):
                return None
            return original(optimizer, *args, **kwargs)

        return step

    def _add_param_group(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def add_param_group(optimizer: Optimizer, group: dict[str, Any]) -> None:
            original(optimizer, group)
            # Parameters that train makes are known from here on, before any gradient reaches them.
            self.recorder.look_again()
            for parameter in optimizer.param_groups[-1]["params"]:
                self.recorder.parts_of(parameter, optimizer)

        return add_param_group

    def _open_step(self, optimizer: Optimizer, *, closure: bool = False) -> Step:
        key = self.recorder.key_of(optimizer)
        step = Step(
            index=len(self.recording.steps),
            optimizer=key,
            samples=frozenset(),
            backwards=self.recorder.backwards,
            first_backward=self.first_backward(key),
            learning_rates=[
                number(group["lr"]) for group in optimizer.param_groups if "lr" in group
            ],
        )
        self.recording.steps.append(step)
        self._untaken.add(step.index)
        if not closure:
            self._take(step)
        return step

    def _take(self, step: Step) -> None:
        """Note what a step used up: with a closure, what that used counts too."""
        self._untaken.discard(step.index)
        taken = self.recorder.usage.take(step.optimizer)
        step.samples = frozenset(each for fetch in taken for each in self.recording.fetched[fetch])
        self.recording.boundaries.append(taken)
        step.backwards = self._first_backward[step.optimizer] = self.recorder.backwards

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (
            self.recorder.is_paused
            or id(optimizer) in self._open
            or not self.recorder.allowed("step")
            or self._is_inner(optimizer)
        ):
            return None
        self.recorder.edits.before_step()
        for each in self.recorder.interventions:
            each.before_step(self.recorder, optimizer)
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        step = self._open_step(optimizer, closure=callable(closure))
        step.handed_over = self.recorder.edits.handed_over()
        self.recorder.note("step", optimizer=step.optimizer, learning_rates=step.learning_rates)
        self._open[id(optimizer)] = step
        self._stepping[id(optimizer)] = {
            id(p) for group in optimizer.param_groups for p in group["params"]
        }
        if not callable(closure):
            self._observe(optimizer, step)
            return None
        with quiet():
            self.recorder.observer.before(self.recorder, step, optimizer)

        begin: int | None = None

        @functools.wraps(closure)
        def first_seen(*inner: Any, **named: Any) -> Any:
            nonlocal begin
            self.recorder.backward.evaluated = []
            if begin is not None:
                self.recorder.backward.repeated = begin
                try:
                    return reweighted(closure(*inner, **named), self.recorder.backward.evaluated)
                finally:
                    self.recorder.backward.repeated = None
            begin = self.recorder.backwards
            result = reweighted(closure(*inner, **named), self.recorder.backward.evaluated)
            if not step.sample:
                self._take(step)
                self._observe(optimizer, step, closure=True)
            return result

        if "closure" in kwargs:
            return args, {**kwargs, "closure": first_seen}
        return (args[0], first_seen, *args[2:]), kwargs

    def _is_inner(self, optimizer: Optimizer) -> bool:
        """Tell the optimizer inside one that shares its parameters out over ranks, and steps with it."""
        if self.recorder.holdings is None or not self._open:
            return False
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return any(mine <= outer for outer in self._stepping.values())

    def _observe(self, optimizer: Optimizer, step: Step, *, closure: bool = False) -> None:
        with quiet():
            if not closure:
                self.recorder.observer.before(self.recorder, step, optimizer)
            scale = getattr(optimizer, "grad_scale", None)
            factor = 1.0 if scale is None else 1.0 / number(scale)
            applied: dict[str, torch.Tensor | None] = {}
            gradients: dict[str, Any] = {}
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    now = None if parameter.grad is None else dense(parameter.grad.detach())
                    before: Any = now
                    if now is not None:
                        if now.shape != parameter.shape and self.recorder.holdings is not None:
                            raise self._unreduced(step, parameter, now)
                        self.recorder.trained.add(parameter.dtype)
                        kept = self.recorder.clips.before(parameter)
                        if kept is not None:
                            before, step.clipped = kept, True
                    for part in self.recorder.parts_of(parameter, optimizer):
                        taken = None if now is None else part.local(now)
                        if taken is not None and factor != 1.0:
                            taken = taken * factor
                        applied[part.name] = taken
                        # The same object tells that no clip came between.
                        gradients[part.name] = (
                            taken if before is now or before is None else part.local(before)
                        )
                        if not part.is_whole:
                            step.parts[part.name] = part.key
            found = getattr(optimizer, "found_inf", None)
            step.skipped = found is not None and number(found) > 0
            self.recorder.observer.gradients(self.recorder, step, gradients, applied)

    def _unreduced(self, step: Step, parameter: torch.Tensor, gradient: torch.Tensor) -> StepError:
        """Return the error of a step that would raise: a shard with the gradient of the whole."""
        recording = self.recorder.recording
        shapes = f"a gradient is {tuple(gradient.shape)}, its parameter {tuple(parameter.shape)}"
        return StepError(
            f"not-reduced: {shapes}"[:100],
            where=f"{recording.role}, rank {self.recorder.rank}, optimizer_step {step.index}",
            expected="gradients of the shape of their parameters when optimizer.step() begins",
            because="gradients are whole where parameters are shards: nothing was reduced after the last backward of "
            "the cycle, as inside of no_sync",
            fix="leave no_sync() before the last micro-batch of every cycle",
        )

    def _after_step(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self.recorder.is_paused or id(optimizer) not in self._open:
            return
        step = self._open.pop(id(optimizer))
        self._stepping.pop(id(optimizer), None)
        with quiet():
            if step.index in self._untaken:  # The closure was not called.
                self._take(step)
            if not step.sample:
                self._observe(optimizer, step, closure=True)
            self.recorder.observer.after(self.recorder, step, optimizer)
        for each in self.recorder.interventions:
            each.after_step(self.recorder, optimizer)
        step.at = time.time_ns()
        self.recorder.clips.snapshots.clear()
        self.recorder.edits.after_step()

    def skipped(self, optimizer: Optimizer) -> None:
        """Note a step that a scaler left out, as a step that changed nothing."""
        step = self._open_step(optimizer)
        with quiet():
            self._observe(optimizer, step)
            step.skipped = True
            self.recorder.observer.after(self.recorder, step, optimizer)
        self.recorder.clips.snapshots.clear()
