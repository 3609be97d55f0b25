"""DeepSpeed's own clips, which call none of torch's: 1.0 is its default, so that one is active in most of its runs.

Measured with 0.19.8: at ZeRO stage 0 `clip_grad_norm_` of its own over the module's parameters; at stages 1 to 3
`unscale_and_clip_grads` of its optimizer, which divides the flat gradient by loss scale and clip at once. Its modules
are looked at only where a script has imported them.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from equivcheck.hooks.base import number, replace

if TYPE_CHECKING:
    from equivcheck.hooks.clips import Clips

__all__ = ["watch"]

_ENGINE = "deepspeed.runtime.engine"
_SHARDED = {
    "deepspeed.runtime.zero.stage_1_and_2": "DeepSpeedZeroOptimizer",
    "deepspeed.runtime.zero.stage3": "DeepSpeedZeroOptimizer_Stage3",
}


def watch(clips: Clips, stack: ExitStack) -> bool:
    """Watch the clips of DeepSpeed; return whether it was there."""
    engine = sys.modules.get(_ENGINE)
    if engine is None:
        return False
    if hasattr(engine, "clip_grad_norm_"):
        replace(stack, engine, "clip_grad_norm_", _whole(clips, engine.clip_grad_norm_))
    for name, owner in _SHARDED.items():
        kind = getattr(sys.modules.get(name), owner, None)
        method = getattr(kind, "unscale_and_clip_grads", None)
        if method is not None:
            replace(stack, kind, "unscale_and_clip_grads", _flat(clips, method))
    return True


def _whole(clips: Clips, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def clip(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        held = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        allowed = clips.before_own(held)
        # Without leave it tells the norm, and clips nothing.
        norm = original(held, max_norm if allowed else math.inf, *args, **kwargs)
        _note(clips, max_norm, norm, 1.0)
        return norm

    return clip


def _flat(clips: Clips, original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def unscale_and_clip(optimizer: Any, which: Any, total_norm: Any) -> Any:
        scale = number(optimizer.loss_scale)
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            held = [optimizer.fp32_partitioned_groups_flat[which]]
        else:
            known = {id(each) for each in which}
            held = [p for p in optimizer.single_partition_of_fp32_groups if id(p.grad) in known]
        limit = optimizer.clip_grad
        if not limit > 0.0:
            return original(optimizer, which, total_norm)
        allowed = clips.before_own(held, 1.0 / scale)
        optimizer.clip_grad = limit if allowed else 0.0
        try:
            return original(optimizer, which, total_norm)
        finally:
            optimizer.clip_grad = limit
            _note(clips, limit, number(total_norm) / scale, scale)

    return unscale_and_clip


def _note(clips: Clips, max_norm: Any, norm: Any, scale: float) -> None:
    clips.recorder.note("clip", max_norm=float(max_norm), norm=number(norm), scale=scale)
