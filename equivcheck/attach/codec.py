"""Turn what was recorded into JSON and tensors, and back; nothing is unpickled.

Numbers, text, lists and mappings are JSON's own. Whatever JSON has no word for is an object with the key `$`: tuples,
sets, mappings with other keys than text, tensors, dtypes, the dataclasses of a recording, and interventions, which are
named by their place in a list that both sides have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from equivcheck.differences import Sums
from equivcheck.freeze import Seen
from equivcheck.interventions import Intervention
from equivcheck.recording import Backward, Event, Kept, Place, Reduction, Step
from equivcheck.sampled import Sampled

__all__ = ["Unencodable", "decode", "encode"]

_CLASSES: dict[str, type] = {
    each.__name__: each for each in (Backward, Event, Kept, Place, Reduction, Seen, Step, Sums)
}
# Tensors up to this many elements stand in the JSON: a file header has 100 bytes for each.
_INLINE = 8


class Unencodable(TypeError):  # noqa: N818 - says what the value is
    """A value of a kind that no recording holds."""


class _Encoder:
    def __init__(self, tensors: dict[str, torch.Tensor], known: Sequence[Intervention]) -> None:
        self._tensors = tensors
        self._known = {id(each): index for index, each in enumerate(known)}
        self._names: dict[int, str] = {}
        self._alive: list[torch.Tensor] = []
        self._layouts: dict[tuple[tuple[str, int | None], ...], int] = {}

    def encode(self, value: Any, path: str) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, list):
            return [self.encode(each, f"{path}.{i}") for i, each in enumerate(value)]
        if isinstance(value, (tuple, set, frozenset)):
            items = sorted(value) if isinstance(value, (set, frozenset)) else value
            kind = type(value).__name__ if type(value) in {tuple, set, frozenset} else "tuple"
            return {
                "$": kind,
                "v": [self.encode(each, f"{path}.{i}") for i, each in enumerate(items)],
            }
        if isinstance(value, Sampled):
            return self._sampled(value, path)
        if isinstance(value, Mapping):
            return self._mapping(value, path)
        if isinstance(value, torch.dtype):
            return {"$": "dtype", "v": str(value).removeprefix("torch.")}
        if isinstance(value, Intervention) and id(value) in self._known:
            return {"$": "intervention", "v": self._known[id(value)]}
        if dataclasses.is_dataclass(value) and type(value).__name__ in _CLASSES:
            fields = {
                field.name: self.encode(getattr(value, field.name), f"{path}.{field.name}")
                for field in dataclasses.fields(value)
                if not callable(getattr(value, field.name))
            }
            return {"$": type(value).__name__, "v": fields}
        raise Unencodable(f"{path} is {type(value).__name__}")

    def _mapping(self, value: Mapping[Any, Any], path: str) -> Any:
        if all(isinstance(key, str) and key != "$" for key in value):
            return {key: self.encode(each, f"{path}.{key}") for key, each in value.items()}
        pairs = [
            [self.encode(key, f"{path}.key"), self.encode(each, f"{path}.{i}")]
            for i, (key, each) in enumerate(value.items())
        ]
        return {"$": "map", "v": pairs}

    def _sampled(self, value: Sampled, path: str) -> Any:
        """Name a layout by its number, and spell it out where it comes first."""
        layout = tuple(value.layout)
        new = layout not in self._layouts
        number = self._layouts.setdefault(layout, len(self._layouts))
        written = [number, self._tensor(value.numbers, path)]
        return {"$": "sampled", "v": [*written, *([list(map(list, layout))] if new else [])]}

    def _tensor(self, value: torch.Tensor, path: str) -> Any:
        if value.dtype in {torch.float64, torch.int64} and value.numel() <= _INLINE:
            kind = "floats" if value.is_floating_point() else "ints"
            return {"$": kind, "v": value.detach().flatten().tolist(), "shape": list(value.shape)}
        name = self._names.get(id(value))
        if name is None:
            name = path.lstrip(".")
            while name in self._tensors:
                name += "'"
            self._names[id(value)] = name
            self._alive.append(value)
            self._tensors[name] = value.detach()
        return {"$": "tensor", "v": name}


def encode(
    value: Any, tensors: dict[str, torch.Tensor], *, known: Sequence[Intervention] = ()
) -> Any:
    """Return a value as plain JSON types; its tensors go into `tensors` by a readable name.

    A tensor that stands in two places is written once, and is one tensor again when it is read.

    Args:
        value: What is to be written.
        tensors: Filled with the tensors that are too large to stand in the JSON.
        known: Interventions that the reader has too, in the same order.

    Raises:
        Unencodable: Something in it has no place in a recording: a module, a function.
    """
    return _Encoder(tensors, known).encode(value, "")


def decode(
    value: Any, tensors: Mapping[str, torch.Tensor], *, known: Sequence[Intervention] = ()
) -> Any:
    """Return what `encode` was given.

    Raises:
        KeyError, TypeError, ValueError, IndexError: It is no such value.
    """
    layouts: dict[int, list[tuple[str, int | None]]] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(each) for each in value]
        if not isinstance(value, dict):
            return value
        kind = value.get("$")
        if kind is None:
            return {key: walk(each) for key, each in value.items()}
        inner = value["v"]
        if kind in _CLASSES:
            known_fields = {field.name for field in dataclasses.fields(_CLASSES[kind])}
            return _CLASSES[kind](
                **{key: walk(each) for key, each in inner.items() if key in known_fields}
            )
        if kind == "tensor":
            return tensors[inner]
        if kind == "sampled":
            number, numbers, *spelled = inner
            for each in spelled:
                layouts[number] = [(name, length) for name, length in each]
            return Sampled(layouts[number], walk(numbers))
        if kind in {"floats", "ints"}:
            dtype = torch.float64 if kind == "floats" else torch.int64
            return torch.tensor(inner, dtype=dtype).view(value["shape"])
        if kind == "map":
            return {walk(key): walk(each) for key, each in inner}
        if kind == "dtype":
            return getattr(torch, inner)
        if kind == "intervention":
            return known[inner]
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](
            walk(each) for each in inner
        )

    return walk(value)
