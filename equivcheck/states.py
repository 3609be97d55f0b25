"""Parameters, buffers and optimizer state of a run: taken, and set to what another run had."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.parts import Part, is_distributed, plain
from equivcheck.recording import Kept

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


def set_state(recorder: Recorder, optimizer: Optimizer | None, kept: Kept) -> None:
    """Set parameters, buffers and one optimizer's state to what the reference had; dtypes stay as they are.

    What was read is given back every now and then: together it would be as large as the run itself.
    """
    if recorder.holdings is not None:
        for part in recorder.holdings.held():
            if part.name in kept.after:
                part.local(part.holder.detach()).copy_(part.cut(kept.after[part.name]))
                kept.release(part.holder.nbytes)
    else:
        for name, parameter in recorder.parameters().items():
            if name in kept.after and kept.after[name].shape == parameter.shape:
                parameter.detach().copy_(kept.after[name])
                kept.release(parameter.nbytes)
    for name, buffer in recorder.model.named_buffers():
        if name in kept.buffers and kept.buffers[name].shape == buffer.shape:
            buffer.detach().copy_(kept.buffers[name])
    if optimizer is None:
        return
    optimizer = owner_of_state(optimizer)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for part in recorder.parts_of(parameter, optimizer):
                if part.name not in kept.state:
                    continue
                entries = optimizer.state[parameter]
                if part.is_whole and not is_distributed(parameter):
                    _set_entries(entries, kept.state[part.name], parameter)
                else:
                    _set_part(entries, kept.state[part.name], part)
                kept.release(len(entries) * parameter.nbytes)


def owner_of_state(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that holds the state: of one that shares it out over ranks, the one inside."""
    inner = getattr(optimizer, "optim", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def _set_part(mine: dict[str, Any], theirs: dict[str, Any], part: Part) -> None:
    """Set the entries of a sharded parameter that this rank has; what lies like it is cut like it."""
    for key, value in theirs.items():
        old = mine.get(key)
        if isinstance(value, torch.Tensor) and isinstance(old, torch.Tensor):
            if value.dim():
                part.local(old.detach()).copy_(part.cut(value))
            else:
                plain(old.detach()).copy_(value)
        elif not isinstance(value, torch.Tensor):
            mine[key] = copy.copy(value)


def _set_entries(mine: dict[str, Any], theirs: dict[str, Any], parameter: torch.Tensor) -> None:
    for key, value in theirs.items():
        old = mine.get(key)
        if isinstance(value, torch.Tensor):
            if (
                isinstance(old, torch.Tensor)
                and old.shape == value.shape
                and old.is_floating_point() == value.is_floating_point()
            ):
                old.detach().copy_(value)
            else:
                like = (
                    parameter.dtype
                    if value.is_floating_point() and value.shape == parameter.shape
                    else None
                )
                mine[key] = value.detach().clone().to(like or value.dtype)
        elif isinstance(value, (list, tuple)) and any(
            isinstance(each, torch.Tensor) for each in value
        ):
            cast = [
                each.clone().to(parameter.dtype) if isinstance(each, torch.Tensor) else each
                for each in value
            ]
            mine[key] = type(value)(cast)
        else:
            mine[key] = copy.copy(value)


def state_of(
    recorder: Recorder, optimizer: Optimizer, keep: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, dict[str, Any]]:
    """Return an optimizer's state by name of the parameter; `keep` is given every tensor in it."""
    found: dict[str, dict[str, Any]] = {}
    optimizer = owner_of_state(optimizer)
    for parameter, entries in optimizer.state.items():
        if not isinstance(entries, dict):
            continue
        if recorder.holdings is not None:
            for part in recorder.parts_of(parameter, optimizer):
                found[part.name] = {k: _local(v, part) for k, v in entries.items()}
            continue
        name = recorder.names.get(id(parameter))
        if name is not None:
            found[name] = {key: _copied(value, keep) for key, value in entries.items()}
    return found


def _local(value: Any, part: Part) -> Any:
    if isinstance(value, torch.Tensor):
        return part.local(value.detach()) if value.dim() else plain(value.detach())
    return value


def _copied(value: Any, keep: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return keep(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(each, keep) for each in value])
    return copy.copy(value) if isinstance(value, (dict, set)) else value


def numbers(entries: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what is a number in one parameter's state, as tensors."""
    for key, value in entries.items():
        if isinstance(value, torch.Tensor):
            yield key, value
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, torch.tensor(float(value), dtype=torch.float64)
