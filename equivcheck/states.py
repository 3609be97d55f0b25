"""Parameters, buffers and optimizer state of a run: taken, and set to what another run had."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from equivcheck.recording import Kept

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder


def set_state(recorder: Recorder, optimizer: Optimizer | None, kept: Kept) -> None:
    """Set parameters, buffers and one optimizer's state to what the reference had; dtypes stay as they are."""
    for name, parameter in recorder.parameters().items():
        if name in kept.after and kept.after[name].shape == parameter.shape:
            parameter.detach().copy_(kept.after[name])
    for name, buffer in recorder.model.named_buffers():
        if name in kept.buffers and kept.buffers[name].shape == buffer.shape:
            buffer.detach().copy_(kept.buffers[name])
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = recorder.names.get(id(parameter), "")
            if name in kept.state:
                _set_entries(optimizer.state[parameter], kept.state[name], parameter)


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
    for parameter, entries in optimizer.state.items():
        name = recorder.names.get(id(parameter))
        if name is None or not isinstance(entries, dict):
            continue
        found[name] = {key: _copied(value, keep) for key, value in entries.items()}
    return found


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
