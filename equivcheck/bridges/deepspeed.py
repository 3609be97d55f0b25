"""DeepSpeed computes in torch; it is only told that float64 can be reduced, which its accelerators' lists leave out.

Without that its engine asserts, at ZeRO stage 0, that every gradient is float32, bfloat16 or float16 (0.19.8,
`runtime/engine.py`, `split_half_float_double_sparse`), and a promoted run could not take a step. What is reduced, and
how, does not depend on it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from equivcheck.hooks.base import replace

__all__ = ["across", "install"]


def install(stack: ExitStack) -> None:
    """Add float64 to what the accelerator in use says it supports."""
    kind = type(get_accelerator())
    original = kind.supported_dtypes

    def supported_dtypes(accelerator: Any) -> list[torch.dtype]:
        found = list(original(accelerator))
        return found if torch.float64 in found else [*found, torch.float64]

    replace(stack, kind, "supported_dtypes", supported_dtypes)


def across(_model: Any) -> None:
    """Return None: its models are torch's."""
