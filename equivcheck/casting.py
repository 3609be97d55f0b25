"""Cast to float64: tensors, dtypes, models and batches in any nesting."""

# ruff: noqa: SLF001 - the storage behind tied weights has no public name

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equivcheck.split import walk

# Every floating dtype below float64 and what it becomes; float4_e2m1fn_x2 packs two numbers into
# one element and has no conversion.
PROMOTED: dict[torch.dtype, torch.dtype] = {
    **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float64),
    **dict.fromkeys((torch.float8_e4m3fn, torch.float8_e5m2), torch.float64),
    **dict.fromkeys((torch.float8_e4m3fnuz, torch.float8_e5m2fnuz), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    PROMOTED[torch.float8_e8m0fnu] = torch.float64
COMPLEX_OF = {
    torch.float64: torch.complex128,
    torch.float32: torch.complex64,
    torch.bfloat16: torch.complex64,
    torch.float16: torch.complex32,
}
REAL_OF = {torch.complex64: torch.float32, torch.complex32: torch.float16}
_ARRAY_PROMOTED = {"f2": np.float64, "f4": np.float64, "c8": np.complex128}  # by numpy's codes


def is_inexact(dtype: torch.dtype) -> bool:
    """Return whether a dtype rounds: floating or complex."""
    return dtype.is_floating_point or dtype.is_complex


def up(value: Any) -> Any:
    """Return `value` with tensors and dtypes in any nesting promoted; itself if nothing changes."""
    if isinstance(value, Tensor):
        wanted = PROMOTED.get(value.dtype)
        return value if wanted is None else value.to(wanted)
    if isinstance(value, torch.dtype):
        return PROMOTED.get(value, value)
    if isinstance(value, (list, tuple)):
        changed = [up(item) for item in value]
        if all(new is old for new, old in zip(changed, value, strict=True)):
            return value
        return changed if isinstance(value, list) else tuple(changed)
    if isinstance(value, dict):
        return {key: up(item) for key, item in value.items()}
    return value


def low_dtype(value: Any) -> torch.dtype | None:
    """Return the first low-precision dtype among tensors in any nesting."""
    if isinstance(value, Tensor):
        return value.dtype if value.dtype in PROMOTED else None
    if isinstance(value, (list, tuple)):
        return next((dtype for item in value if (dtype := low_dtype(item)) is not None), None)
    return None


def in_dtype(value: Any, dtype: torch.dtype, pending: list[tuple[Tensor, Tensor]] | None) -> Any:
    """Return `value` with floating tensors and dtypes in `dtype`.

    With `pending`, `value` is written: every tensor is added to it beside what stands in for it.
    """
    if isinstance(value, Tensor):
        wanted = COMPLEX_OF[dtype] if value.is_complex() else dtype
        if value.dtype is wanted or not is_inexact(value.dtype):
            temporary = value
        elif pending is not None and value.layout is torch.strided:
            # The same strides: normal_ and uniform_ draw in an order that depends on them.
            temporary = torch.empty_strided(
                value.size(), value.stride(), dtype=wanted, device=value.device
            ).copy_(value)
        else:
            temporary = value.to(wanted)
        if pending is not None:
            pending.append((value, temporary))
        return temporary
    if isinstance(value, torch.dtype):
        return (COMPLEX_OF[dtype] if value.is_complex else dtype) if is_inexact(value) else value
    if isinstance(value, (list, tuple)):
        return [in_dtype(item, dtype, pending) for item in value]
    return value


def promote_module(module: torch.nn.Module) -> None:
    """Cast a module's parameters, buffers and plain tensor attributes to float64 in place.

    Tensors keep their identity, `requires_grad` and shared storage (tied weights stay tied);
    complex ones become complex128, integers are untouched. Attributes are searched through lists,
    tuples and mappings.
    """
    bases: dict[tuple[int, torch.dtype], Tensor] = {}
    seen: set[int] = set()

    def cast(tensor: Tensor) -> None:
        wanted = PROMOTED.get(tensor.dtype)
        if wanted is None or id(tensor) in seen:
            return
        seen.add(id(tensor))
        gradient, tensor.grad = (tensor.grad, None) if tensor.is_leaf else (None, None)
        if type(tensor) not in {Tensor, torch.nn.Parameter} or tensor.layout is not torch.strided:
            tensor.data = tensor.data.to(wanted)
        else:
            storage = tensor.untyped_storage()
            key = (storage._cdata, tensor.dtype)
            if key not in bases:
                whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
                bases[key] = whole.to(wanted)
            tensor.data = bases[key].as_strided(
                tensor.size(), tensor.stride(), tensor.storage_offset()
            )
        if gradient is not None:
            tensor.grad = gradient.to(PROMOTED.get(gradient.dtype, gradient.dtype))

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            cast(value)
        elif isinstance(value, Mapping):
            for item in value.values():
                visit(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)

    for part in module.modules():
        visit(list(part._parameters.values()))
        visit(list(part._buffers.values()))
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                setattr(part, name, up(value))  # computed from parameters, as by weight_norm
            elif not name.startswith("_") or isinstance(value, Tensor):
                visit(value)


def promote_tree(batch: Any) -> Any:
    """Return `batch` with low-precision tensors and arrays in any nesting cast to float64.

    Mappings, lists, tuples, namedtuples and dataclasses keep their type; complex becomes
    complex128; everything else, integer tensors included, is returned as it is. A tensor that
    occurs twice is one tensor afterwards.
    """
    done: dict[int, Any] = {}

    def cast(_path: str, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            if id(leaf) not in done:
                done[id(leaf)] = up(leaf)
            return done[id(leaf)]
        if isinstance(leaf, np.ndarray):
            return leaf.astype(_ARRAY_PROMOTED.get(leaf.dtype.str[1:], leaf.dtype), copy=False)
        return leaf

    return walk(cast, "batch", batch)
