"""Find the copies of the weights that a loop keeps beside its model.

An average, a teacher, a master copy live in the loop's own variables, so they are looked for there: modules, and
dictionaries or lists of tensors or arrays, in the locals of the user's running frames and in their objects, a model
that they are hung on included. A find counts as shadow weights only if its tensors have the shapes of parameters and
point in their direction; a buffer of gradients does not. Those that live inside the model are parameters that no
optimizer holds, have no gradient, and move all the same.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from equivcheck.parts import is_distributed, part_like, plain
from equivcheck.usercode import is_library

if TYPE_CHECKING:
    from equivcheck.recorder import Recorder

# An average over training stays within a small angle of the weights; gradients are nearly
# orthogonal to them.
LIKE_WEIGHTS = 0.7
DEPTH = 3
# Coordinates of each parameter that tell whether it moved: a large frozen model is not copied to find out.
PROBE = 32
# What torch itself keeps in the attributes of a module.
_REGISTERED = frozenset(vars(nn.Module()))


def shadow_weights(recorder: Recorder, *, ended: bool = False) -> dict[str, torch.Tensor]:
    """Return the shadow weights by path (`ema.fc.weight`), live tensors.

    Args:
        recorder: The recorder of the run; it remembers what was found while the frames were alive.
        ended: The run is over, its frames are gone: read again what was found before.
    """
    holders = recorder.shadow_holders
    if not ended:
        variables = itertools.chain(_variables(sys._getframe(1)), _added(recorder))
        for name, value, owner in variables:
            if name not in holders or holders[name] is not value:
                recorder.shadow_owners.pop(name, None)
                if _is_holder(value, recorder):
                    holders[name] = value
                    if owner is not None:
                        recorder.shadow_owners[name] = owner
                else:
                    holders.pop(name, None)
    found: dict[str, torch.Tensor] = {}
    for name, tensors in _copies(recorder):
        found.update({f"{name}.{key}": tensor.detach() for key, tensor in tensors.items()})
    found.update({name: p.detach() for name, p in untrained(recorder) if _moved(recorder, name, p)})
    return found


def shadow_holders(recorder: Recorder) -> dict[str, Any]:
    """Return the modules, dictionaries and lists that hold shadow weights now, by name."""
    shadow_weights(recorder)
    return {name: recorder.shadow_holders[name] for name, _ in _copies(recorder)}


def _copies(recorder: Recorder) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Yield the tensors of every holder that holds copies of the weights, and not a batch, say."""
    for name, value in recorder.shadow_holders.items():
        tensors = dict(_tensors(value, recorder))
        if tensors and _like_weights(tensors, recorder):
            yield name, tensors


def probes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a few coordinates of every parameter, as they are now."""
    return {name: _probe(p).clone() for name, p in model.named_parameters()}


def untrained(recorder: Recorder) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the model that no optimizer holds and that have no gradient.

    With ranks a parameter that this one's optimizers do not hold may be a shard of another's: there only what is whole
    and asks for no gradient is known to be nobody's.
    """
    held, holdings = _held(recorder), recorder.holdings
    for name, parameter in recorder.model.named_parameters():
        if id(parameter) in held or parameter.grad is not None:
            continue
        if holdings is None:
            yield name, parameter
        elif not parameter.requires_grad and not is_distributed(parameter):
            own = holdings.name_in(name)
            if own is not None and holdings.shape(own) == tuple(parameter.shape):
                yield own, parameter


def _held(recorder: Recorder) -> set[int]:
    optimizers = [optimizer() for optimizer in recorder.alive.values()]
    return {
        id(parameter)
        for optimizer in optimizers
        if optimizer is not None
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _added(recorder: Recorder) -> Iterator[tuple[str, nn.Module, None]]:
    """Yield the modules that the loop has put into its model, and trains no parameter of.

    A wrapper that takes the place of a module holds what was there before.
    """
    held = _held(recorder)
    pending = list(recorder.model.named_children())
    while pending:
        name, module = pending.pop()
        if any(id(each) in recorder.modules for each in module.modules()):
            pending += [(f"{name}.{key}", each) for key, each in module.named_children()]
        elif all(id(p) not in held and p.grad is None for p in module.parameters()):
            yield name, module, None


def _moved(recorder: Recorder, name: str, parameter: nn.Parameter) -> bool:
    start = recorder.start.get(name)
    now = _probe(parameter)
    return start is not None and start.shape == now.shape and not torch.equal(start, now)


def _probe(parameter: torch.Tensor) -> torch.Tensor:
    return plain(parameter.detach()).flatten()[:PROBE]


def _variables(frame: FrameType | None) -> Iterator[tuple[str, Any, Any]]:
    while frame is not None:
        code = frame.f_code
        if code.co_name == "_call_train":
            return
        if not is_library(code.co_filename):
            for name, value in list(frame.f_locals.items()):
                yield from _reach(name, value, None, DEPTH)
        frame = frame.f_back


def _reach(name: str, value: Any, owner: Any, depth: int) -> Iterator[tuple[str, Any, Any]]:
    """Yield a value and what its attributes hold, each with the object that it is an attribute of."""
    yield name, value, owner
    if depth == 0 or isinstance(
        value, (torch.Tensor, Mapping, list, tuple, str, int, float, type(None))
    ):
        return
    module = getattr(type(value), "__module__", "")
    is_module = isinstance(value, nn.Module)
    if not is_module and module.split(".")[0] in {"torch", "builtins", "numpy", "collections"}:
        return
    for key, inner in list(getattr(value, "__dict__", {}).items()):
        # What is registered with a module is its own, and seen as such.
        if not (is_module and key in _REGISTERED):
            yield from _reach(f"{name}.{key}", inner, value, depth - 1)


def _is_holder(value: Any, recorder: Recorder) -> bool:
    if isinstance(value, nn.Module):
        own = {id(p) for p in value.parameters()}
        return bool(own) and not own & set(recorder.names)
    if isinstance(value, (Mapping, list, tuple)):
        held = value.values() if isinstance(value, Mapping) else value
        return 0 < len(value) < 10_000 and all(
            isinstance(each, (torch.Tensor, np.ndarray)) for each in held
        )
    return False


def _tensors(value: Any, recorder: Recorder) -> Iterator[tuple[str, torch.Tensor]]:
    is_module = isinstance(value, nn.Module)
    if isinstance(value, nn.Module):
        pairs: Any = list(value.named_parameters()) + list(value.named_buffers())
    elif isinstance(value, Mapping):
        pairs = value.items()
    else:
        pairs = enumerate(value)
    names = set(recorder.names.values())
    for key, each in pairs:
        tensor = as_tensor(each)
        if (
            tensor is not None
            and tensor.is_floating_point()
            and id(tensor) not in recorder.names
            # A module's parameters are copies even where a loop moves them without `no_grad`, and so is what has their
            # names; what a list holds may be outputs.
            and (is_module or tensor.grad_fn is None or key in names)
        ):
            yield str(key), tensor


def as_tensor(value: Any) -> torch.Tensor | None:
    """Return a tensor as it is, or one that shares the memory of an array; None for anything else.

    No array is promoted: one of float32 rounds as no run in float64 does, and is left aside.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.float64 and value.flags.writeable:
        return torch.from_numpy(value)
    return value if isinstance(value, torch.Tensor) else None


def _like_weights(tensors: dict[str, torch.Tensor], recorder: Recorder) -> bool:
    """Return whether tensors match parameters in shape, by name or in order, and point in their direction."""
    # A copy of one part of the model has that part's names without its own.
    wholes = (recorder.model, *recorder.model.children())
    return any(_alike(tensors, list(w.named_parameters())) > LIKE_WEIGHTS for w in wholes)


def _alike(tensors: dict[str, torch.Tensor], pool: list[tuple[str, nn.Parameter]]) -> float:
    """Return the cosine between tensors and the parameters that they match, in shape, by name or in order."""
    parameters = dict(pool)
    dot = length = other = 0.0
    for key, tensor in tensors.items():
        match = parameters.get(key)
        if match is None:
            match = next((p for name, p in pool if key.endswith(f".{name}")), None)
        if match is None and key.isdigit() and int(key) < len(pool):
            match = pool[int(key)][1]
        part = None if match is None else part_like(match, key, tuple(tensor.shape))
        if part is None:
            continue
        # Of a sharded parameter a rank looks at what it holds, and asks no other.
        mine, own = plain(part.holder), plain(tensor)
        if not is_distributed(tensor):
            own = part.cut(own)
        if own.shape != mine.shape:
            continue
        a, b = own.detach().double().flatten(), mine.detach().double().flatten()
        dot += float(a @ b)
        length += float(a @ a)
        other += float(b @ b)
    return dot / (length * other) ** 0.5 if length > 0 and other > 0 else 0.0
