"""What is done to gradients between backward and step, by a call: clips and zero_grad."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import clip_grad
from torch.optim import Optimizer

from equivcheck.differences import dense
from equivcheck.hooks import deepspeed
from equivcheck.hooks.base import Hooks, each_of, number, quiet, replace, replace_inside

if TYPE_CHECKING:
    from equivcheck.observe import Glimpse
    from equivcheck.recorder import Recorder


class Clips(Hooks):
    """Watches clips and zero_grad.

    Attributes:
        snapshots: By id of a parameter, its gradient before the last clip, or what the observer keeps of it, and the
            factor that unscales it.
        unscale_first: A clip is to see gradients without the loss scale.
        hand_scale: The loss scale that the loop itself gives, where no scaler does.
    """

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder)
        self.snapshots: dict[int, tuple[torch.Tensor | Glimpse, float]] = {}
        self.unscale_first = False
        self.hand_scale = 1.0
        self._knows_frameworks = False

    def install(self, stack: ExitStack) -> None:
        replace_inside(stack, clip_grad._clip_grads_with_norm_, self._clip_norm)
        replace_inside(stack, clip_grad.clip_grad_value_, self._clip_value)
        if self.recorder.holdings is not None:
            from torch.distributed.fsdp import FullyShardedDataParallel  # noqa: PLC0415 - with ranks only

            own = self._clip_sharded(FullyShardedDataParallel.clip_grad_norm_)
            replace(stack, FullyShardedDataParallel, "clip_grad_norm_", own)
        for owner in (Optimizer, nn.Module):
            replace(stack, owner, "zero_grad", self._zero_grad(owner.zero_grad))
        self.install_frameworks(stack)

    def install_frameworks(self, stack: ExitStack) -> None:
        """Watch the clips that frameworks have of their own, once they are imported."""
        self._knows_frameworks = self._knows_frameworks or deepspeed.watch(self, stack)

    def before_own(self, parameters: list[torch.Tensor], share: float = 1.0) -> bool:
        """Keep the gradients that a framework is about to clip; return whether it may.

        Args:
            parameters: Those whose gradients it clips.
            share: Takes the loss scale off them.
        """
        if not self.recorder.allowed("clip"):
            return False
        self._corrected(parameters, math.nan)
        self._snapshot(parameters, share)
        return True

    def close(self) -> None:
        self.snapshots.clear()

    def unscaled_by(self, optimizer: Optimizer, scale: float) -> None:
        """Note that the gradients of an optimizer were divided by a loss scale after they were clipped."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in self.snapshots:
                    gradient, factor = self.snapshots[id(parameter)]
                    self.snapshots[id(parameter)] = (gradient, factor / scale)

    def before(self, parameter: torch.Tensor) -> torch.Tensor | Glimpse | None:
        """Return what was kept of a gradient before the last clip, unscaled; None if none was."""
        if id(parameter) not in self.snapshots:
            return None
        kept, share = self.snapshots[id(parameter)]
        if isinstance(kept, torch.Tensor):
            kept = dense(kept)
        return kept if share == 1.0 else kept * share

    def _snapshot(self, parameters: Any, share: float = 1.0) -> None:
        with_gradients = [p for p in each_of(parameters) if p.grad is not None]
        with quiet():
            kept = self.recorder.observer.snapshots(self.recorder, with_gradients)
        for parameter, each in zip(with_gradients, kept, strict=True):
            self.snapshots[id(parameter)] = (each, share)

    def _corrected(self, parameters: Any, total_norm: Any) -> Any:
        """Let interventions put gradients right, and return their norm, of the order that the given one is of."""
        if not self.recorder.interventions:
            return total_norm
        before = [p.grad for p in each_of(parameters) if p.grad is not None]
        for each in self.recorder.interventions:
            each.before_clip(self.recorder, each_of(parameters))
        after = [p.grad for p in each_of(parameters) if p.grad is not None]
        if len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True)):
            return total_norm
        given = number(total_norm)
        orders = (2.0, math.inf, 1.0, 0.5, 3.0)
        order = min(
            orders,
            key=lambda p: (
                abs(number(clip_grad._get_total_norm(before, p)) - given) if before else 0.0
            ),
        )
        return (
            clip_grad._get_total_norm(after, order).to(total_norm)
            if isinstance(total_norm, torch.Tensor)
            else total_norm
        )

    def _clip_norm(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip(parameters: Any, max_norm: Any, total_norm: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = _as_list(parameters)
            self.recorder.note(
                "clip",
                max_norm=float(max_norm),
                norm=number(total_norm),
                scale=self.recorder.scaling.pending(),
            )
            if not self.recorder.allowed("clip"):
                return None
            total_norm = self._corrected(parameters, total_norm)
            self._snapshot(parameters)
            for each in self.recorder.interventions:
                total_norm = each.clip_norm(self.recorder, total_norm)
            max_norm = self._maximum(max_norm)
            with self._unscaled(parameters) as pending:
                if pending != 1.0:
                    total_norm = total_norm / pending
                result = original(parameters, max_norm, total_norm, *args, **kwargs)
            self.recorder.edits.after_clip()
            return result

        return clip

    def _maximum(self, max_norm: Any) -> Any:
        for each in self.recorder.interventions:
            max_norm = each.clip_maximum(self.recorder, max_norm)
        return max_norm

    def _clip_sharded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Watch FSDP1's own clip, which takes the norm over all shards."""

        @functools.wraps(original)
        def clip(module: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
            allowed = self.recorder.allowed("clip")
            if allowed:
                self._snapshot(self.recorder.gradient_holders())
            # Without leave it tells the norm, and clips nothing.
            most = self._maximum(max_norm) if allowed else math.inf
            norm = original(module, most, *args, **kwargs)
            self.recorder.note(
                "clip",
                max_norm=float(max_norm),
                norm=number(norm),
                scale=self.recorder.scaling.pending(),
            )
            return norm

        return clip

    def _clip_value(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def clip(parameters: Any, clip_value: Any, *args: Any, **kwargs: Any) -> Any:
            parameters = _as_list(parameters)
            self.recorder.note(
                "clip", max_value=float(clip_value), scale=self.recorder.scaling.pending()
            )
            if not self.recorder.allowed("clip"):
                return None
            self._corrected(parameters, math.nan)
            self._snapshot(parameters)
            with self._unscaled(parameters):
                result = original(parameters, clip_value, *args, **kwargs)
            self.recorder.edits.after_clip()
            return result

        return clip

    @contextmanager
    def _unscaled(self, parameters: Any) -> Iterator[float]:
        """Let a clip see gradients without the loss scale, if an intervention asks for it."""
        pending = self.recorder.scaling.pending() * self.hand_scale if self.unscale_first else 1.0
        gradients = (
            [] if pending == 1.0 else [p.grad for p in each_of(parameters) if p.grad is not None]
        )
        with torch.no_grad():
            for gradient in gradients:
                gradient.div_(pending)
        yield pending
        with torch.no_grad():
            for gradient in gradients:
                gradient.mul_(pending)

    def _zero_grad(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def zero_grad(owner: Any, *args: Any, **kwargs: Any) -> Any:
            self.recorder.note("zero_grad")
            if not self.recorder.allowed("zero_grad"):
                return None
            self.recorder.edits.zeroed()
            return original(owner, *args, **kwargs)

        return zero_grad


def _as_list(parameters: Any) -> Any:
    # A generator, as model.parameters() is, can be walked only once: it is kept for the original too.
    return parameters if isinstance(parameters, torch.Tensor) else list(parameters)
