"""Which part of each parameter a rank holds: the whole, a shard of a DTensor, or a stretch of a flat parameter.

A reference's tensor is cut to the same part, so that ranks are compared shard by shard and none needs the whole model.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WHOLE = ("whole",)


@dataclass(frozen=True)
class Part:
    """What a rank holds of one parameter.

    Attributes:
        name: Name of the parameter in the model that `build` returned.
        holder: The tensor in which this rank holds it.
        local: Takes the part out of a tensor that lies like the holder: itself, a gradient, a moment.
        cut: Takes the same part out of a whole tensor of the parameter's shape.
        key: Equal for ranks that hold the same part.
    """

    name: str
    holder: torch.Tensor
    local: Callable[[torch.Tensor], torch.Tensor]
    cut: Callable[[torch.Tensor], torch.Tensor]
    key: Hashable = WHOLE

    @property
    def is_whole(self) -> bool:
        """Whether the rank holds all of the parameter."""
        return self.key == WHOLE


def itself(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor."""
    return tensor


def is_distributed(tensor: Any) -> bool:
    """Tell a DTensor; without importing its module where nothing has."""
    return hasattr(tensor, "placements") and hasattr(tensor, "_local_tensor")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this rank holds of a tensor, without any communication."""
    return tensor._local_tensor if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


class Holdings:
    """What this rank holds of the model's parameters, as far as its optimizers have shown.

    Args:
        model: As `build` returned it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sizes = {name: p.numel() for name, p in model.named_parameters()}
        self._shapes = {name: p.shape for name, p in model.named_parameters()}
        # Wrappers take parameters out of their modules; the modules stay.
        self._modules = {id(module): name for name, module in model.named_modules()}
        first = {id(p): name for name, p in model.named_parameters()}
        self._aliases = {
            name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)
        }
        self._handles: list[weakref.ref[Any]] = []
        self._found: dict[int, list[Part]] = {}
        self._by_name: dict[str, Part] = {}

    def install(self, stack: ExitStack) -> None:
        """Notice every flat parameter that FSDP1 makes, until the stack is closed."""
        from torch.distributed.fsdp._flat_param import FlatParamHandle  # noqa: PLC0415 - with ranks only

        original = FlatParamHandle.__init__

        @functools.wraps(original)
        def init(handle: Any, *args: Any, **kwargs: Any) -> None:
            self._handles.append(weakref.ref(handle))
            original(handle, *args, **kwargs)

        owner: Any = FlatParamHandle
        owner.__init__ = init
        stack.callback(setattr, owner, "__init__", original)

    def close(self) -> None:
        """Let go of the parameters."""
        self._found.clear()
        self._by_name.clear()
        self._handles.clear()

    def name_in(self, name: str) -> str | None:
        """Return the name that a parameter had in the model before wrappers; None if it had none."""
        for prefix in ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module."):
            name = name.replace(prefix, "")
        return self._aliases.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole parameter."""
        return tuple(self._shapes.get(name, (self.sizes[name],)))

    def of(self, name: str) -> Part | None:
        """Return the part that is held of a parameter."""
        return self._by_name.get(name)

    def held(self) -> list[Part]:
        """Return all parts that were asked for so far."""
        return [part for parts in self._found.values() for part in parts]

    def parts(self, parameter: torch.Tensor, name: str | None) -> list[Part] | None:
        """Return what a parameter of an optimizer holds; None where it is not known to be of the model.

        Args:
            parameter: As the optimizer has it.
            name: Its name in the model, or a name of our own; None where it has none.
        """
        known = self._found.get(id(parameter))
        if known is not None and all(part.holder is parameter for part in known):
            return known
        found = self._find(parameter, name)
        if found is not None:
            self._found[id(parameter)] = found
            for part in found:
                self._by_name[part.name] = part
                self.sizes.setdefault(part.name, parameter.numel())
        return found

    def _find(self, parameter: torch.Tensor, name: str | None) -> list[Part] | None:
        if hasattr(parameter, "_shard_param_infos"):
            return self._of_flat(parameter)
        if is_distributed(parameter):
            return [_of_dtensor(parameter, name)] if name is not None else None
        if name is not None and parameter.shape == self._shapes.get(name, parameter.shape):
            return [Part(name, parameter, itself, itself)]
        return self._of_original(parameter)

    def _of_flat(self, flat: Any) -> list[Part]:
        """Return the stretches of parameters that an FSDP1 flat parameter holds of them."""
        sharded = flat.numel() < sum(flat._numels)
        found, begin = [], 0
        for info, numel, shard in zip(
            flat._param_infos, self._without_padding(flat), flat._shard_param_infos, strict=True
        ):
            name = self._full_name(info)
            if name is not None and not sharded:
                found.append(_stretch(name, flat, begin, 0, numel))
            elif name is not None and shard.in_shard:
                start, length = shard.intra_param_start_idx, shard.numel_in_shard
                found.append(_stretch(name, flat, shard.offset_in_shard, start, length))
            begin += numel
        return found

    @staticmethod
    def _without_padding(flat: Any) -> list[int]:
        mask = getattr(flat, "_is_padding_mask", None) or [False] * len(flat._numels)
        return [n for n, padding in zip(flat._numels, mask, strict=True) if not padding]

    def _of_original(self, parameter: torch.Tensor) -> list[Part] | None:
        """Return the stretch that an original parameter of FSDP1 (`use_orig_params`) has become."""
        for reference in self._handles:
            handle = reference()
            flat = getattr(handle, "flat_param", None)
            originals = getattr(flat, "_params", None)
            if flat is None or originals is None:
                continue
            for info, shard, each in zip(
                flat._param_infos, flat._shard_param_infos, originals, strict=True
            ):
                name = self._full_name(info)
                if each is parameter and name is not None:
                    if not shard.in_shard:
                        return []
                    start, length = shard.intra_param_start_idx, shard.numel_in_shard
                    return [_stretch(name, parameter, 0, start, length)]
        return None

    def gathered(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the whole parameters that `fully_shard` has gathered, by name: gradients arrive at them.

        Not those that are shared out along another dimension of a mesh still.
        """
        found: dict[str, torch.Tensor] = {}
        for module in model.modules():
            sharded: Any = module
            state = sharded._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            for group in getattr(state, "_fsdp_param_groups", ()):
                for each in group.fsdp_params:
                    name = self._full_name(each._module_info)
                    whole = getattr(each, "_unsharded_param", None)
                    if name is not None and whole is not None and not is_distributed(whole):
                        found[name] = whole
        return found

    def _full_name(self, info: Any) -> str | None:
        module = self._modules.get(id(info.module))
        if module is None:
            return None
        name = f"{module}.{info.param_name}" if module else str(info.param_name)
        return self._aliases.get(name, name)


def part_like(tensor: torch.Tensor, name: str, shape: tuple[int, ...]) -> Part | None:
    """Return what this rank holds in a tensor of the loop's own, and how it is cut out of a whole one of some shape.

    None where the two do not fit each other.
    """
    if tuple(tensor.shape) != shape:
        return None
    return (
        _of_dtensor(tensor, name) if is_distributed(tensor) else Part(name, tensor, itself, itself)
    )


def _stretch(name: str, holder: torch.Tensor, begin: int, start: int, length: int) -> Part:
    return Part(
        name,
        holder,
        lambda tensor: tensor.detach().flatten()[begin : begin + length],
        lambda whole: whole.flatten()[start : start + length],
        ("stretch", start, length),
    )


def _splits(placement: Any) -> bool:
    # Shard, and the strided one that tensor parallelism under FSDP2 makes, which is no subclass of it.
    return hasattr(placement, "_split_tensor")


def _of_dtensor(parameter: Any, name: str) -> Part:
    mesh, placements = parameter.device_mesh, tuple(parameter.placements)
    place = mesh.get_coordinate() or [0] * mesh.ndim

    def cut(whole: torch.Tensor) -> torch.Tensor:
        for dim, placement in enumerate(placements):
            if _splits(placement):
                pieces, _ = placement._split_tensor(
                    whole, mesh.size(dim), with_padding=False, contiguous=False
                )
                whole = pieces[place[dim]]
        return whole

    def local(tensor: torch.Tensor) -> torch.Tensor:
        if not is_distributed(tensor):
            return tensor
        if tuple(tensor.placements) != placements:  # type: ignore[attr-defined]
            tensor = tensor.redistribute(mesh, placements)  # type: ignore[attr-defined]
        return plain(tensor)

    cuts = [(dim, place[dim]) for dim, placement in enumerate(placements) if _splits(placement)]
    key: Hashable = ("shard", str(placements), tuple(cuts)) if cuts else WHOLE
    return Part(name, parameter, local, cut, key)


def positions(
    part: Part, chosen: torch.Tensor | None, shape: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return which of the sampled coordinates of a parameter lie in a part, and where in it.

    Args:
        part: What this rank holds.
        chosen: Sampled indices into the flattened parameter; None for all of them.
        shape: Shape of the whole parameter.

    Returns:
        Places among the sampled coordinates, places in the flattened part (both int64), and how many are sampled.
    """
    size = math.prod(shape)
    count = size if chosen is None else len(chosen)
    # Of a large parameter only a few coordinates are sampled: nothing as large as the parameter is made for them.
    window = None if chosen is None else _window(part, shape)
    if window is not None and chosen is not None:
        inside, place = _in_window(chosen, *window)
        return inside.nonzero().flatten(), place[inside], count
    marks = torch.full((size,), -1, dtype=torch.int32)
    marks[slice(None) if chosen is None else chosen] = torch.arange(count, dtype=torch.int32)
    mine = part.cut(marks.view(shape)).flatten()
    held = (mine >= 0).nonzero().flatten()
    return mine[held].long(), held, count


def _window(
    part: Part, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None:
    """Return shape, first place and sizes of the window that a part is of a whole; None if it is none.

    A stretch is a window of the flattened whole.
    """
    whole = torch.empty(shape, device="meta")
    try:
        cut = part.cut(whole)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # It is put together from pieces that are looked at.
        return None
    base = cut._base if cut._base is not None else cut
    flat = shape if cut.dim() == len(shape) else (math.prod(shape),)
    strides = tuple(math.prod(flat[d + 1 :]) for d in range(len(flat)))
    if base is not whole or cut.dim() != len(flat) or cut.stride() != strides:
        return None
    first, rest = [], cut.storage_offset()
    for stride in strides:
        first.append(rest // stride if stride else 0)
        rest %= stride or 1
    return flat, tuple(first), tuple(cut.shape)


def _in_window(
    chosen: torch.Tensor, shape: tuple[int, ...], first: tuple[int, ...], sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which indices into a flattened whole lie in a window, and where in the flattened window."""
    inside = torch.ones_like(chosen, dtype=torch.bool)
    place = torch.zeros_like(chosen)
    rest = chosen
    for length, begin, size in zip(reversed(shape), reversed(first), reversed(sizes), strict=True):
        inside &= (rest % length >= begin) & (rest % length < begin + size)
        rest = rest // length
    rest, unit = chosen, 1
    for length, begin, size in zip(reversed(shape), reversed(first), reversed(sizes), strict=True):
        place += (rest % length - begin) * unit
        rest, unit = rest // length, unit * size
    return inside, place
