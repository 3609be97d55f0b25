"""Loss scales, and the precision that autocast asks for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from equivcheck.hooks.base import Hooks, replace

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


class Scaling(Hooks):
    """Watches `GradScaler`, and which dtypes autocast computes in.

    Attributes:
        loss_scale: What a scaler multiplied the last loss with.
        is_pending: Whether the gradients still carry it.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.loss_scale = 1.0
        self.is_pending = False
        self._depth = 0

    def install(self, stack: ExitStack) -> None:
        replace(stack, GradScaler, "scale", self._scale(GradScaler.scale))
        replace(stack, GradScaler, "unscale_", self._unscale(GradScaler.unscale_))
        replace(stack, GradScaler, "step", self._step(GradScaler.step))
        replace(stack, GradScaler, "update", self._update(GradScaler.update))
        enter = self._enter_autocast(torch.autocast.__enter__)
        replace(stack, torch.autocast, "__enter__", enter)

    def pending(self) -> float:
        """Return the loss scale that the gradients still carry: 1 once they were unscaled, by a call or by hand."""
        if self.is_pending and not self.recorder.edits.divided_by(self.loss_scale):
            return self.loss_scale
        return 1.0

    def _enter_autocast(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def enter(owner: Any) -> Any:
            if owner._enabled and isinstance(owner.fast_dtype, torch.dtype):
                self.recorder.autocast.add(owner.fast_dtype)
            return original(owner)

        return enter

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            result = original(scaler, outputs)
            if scaler.is_enabled():
                self.loss_scale = float(scaler.get_scale())
                self.is_pending = True
            return result

        return scale

    def _unscale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def unscale_(scaler: GradScaler, optimizer: Optimizer) -> Any:
            if not scaler.is_enabled():
                return original(scaler, optimizer)
            explicit = not self._depth
            if explicit:
                self.recorder.note("unscale")
                if not self.recorder.allowed("unscale"):
                    for each in self.recorder.interventions:
                        each.left_out("unscale", lambda: scaler.unscale_(optimizer))
                    return None
            result = original(scaler, optimizer)
            scale = float(scaler.get_scale())
            self.recorder.clips.unscaled_by(optimizer, scale)
            self.is_pending = False
            self.recorder.edits.forget()
            return result

        return unscale_

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def step(scaler: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if scaler.is_enabled() and not self.recorder.allowed("step"):
                return None  # With the unscaling that belongs to it.
            self._depth += 1
            before = len(self.recording.steps)
            try:
                result = original(scaler, optimizer, *args, **kwargs)
            finally:
                self._depth -= 1
            if scaler.is_enabled() and len(self.recording.steps) == before:
                self.recorder.note("skipped", scale=float(scaler.get_scale()))
                self.recorder.steps.skipped(optimizer)
            return result

        return step

    def _update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            if scaler.is_enabled():
                self.recorder.note("scaler", scale=float(scaler.get_scale()))
                if not self.recorder.allowed("scaler"):
                    return None
            return original(scaler, *args, **kwargs)

        return update
