"""Sampled coordinates of many tensors, one after the other in one."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

__all__ = ["Layout", "Sampled", "Tray", "packed"]

# Names in order, each with how many numbers it has; None for one that has no tensor.
Layout = Sequence[tuple[str, "int | None"]]


class Sampled(Mapping[str, Any]):
    """Reads as a mapping of float64 vectors (None where there is no tensor), and is written as one tensor.

    A watched process takes dozens of vectors at every backward: one tensor for all is cheaper to keep, to name and to
    write, and what nobody looks at is never converted.

    Args:
        layout: What each name has of the numbers.
        numbers: [sum of the lengths], any floating dtype, on the cpu.
    """

    def __init__(self, layout: Layout, numbers: torch.Tensor) -> None:
        self.layout = layout
        self.numbers = numbers
        self._places: dict[str, tuple[int, int] | None] | None = None

    def _known(self) -> dict[str, tuple[int, int] | None]:
        if self._places is None:
            self._places, begin = {}, 0
            for name, length in self.layout:
                self._places[name] = None if length is None else (begin, length)
                begin += length or 0
        return self._places

    def __getitem__(self, name: str) -> Any:
        place = self._known()[name]
        return None if place is None else self.numbers.narrow(0, *place).to(torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self.layout)


class Tray:
    """Memory apart from the heap for what is kept of a run for long.

    A loop takes and gives back blocks of megabytes at every backward. Small ones that are kept in between hold the
    allocator from using their place again: a script of ten million parameters had twice its page faults, and took an
    eighth longer.
    """

    def __init__(self) -> None:
        self._map: mmap.mmap | None = None
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a vector of so many numbers, not set to anything, on the cpu."""
        size = count * dtype.itemsize
        if not size:
            return torch.empty(0, dtype=dtype)
        if self._map is None or self._used + size > len(self._map):
            # Pages that are never written to take no memory.
            self._map, self._used = mmap.mmap(-1, max(size, _BLOCK)), 0
        found = torch.frombuffer(self._map, dtype=dtype, count=count, offset=self._used)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return found


_BLOCK = 16 * 2**20
_ALIGNED = 64


def packed(vectors: Mapping[str, torch.Tensor | None], tray: Tray) -> Sampled:
    """Return vectors, on the cpu, as one mapping; in the finest of their dtypes, so that nothing is rounded."""
    layout = [(name, None if each is None else len(each)) for name, each in vectors.items()]
    present = [each for each in vectors.values() if each is not None]
    if not present:
        return Sampled(layout, torch.empty(0))
    dtype = functools.reduce(torch.promote_types, {each.dtype for each in present})
    return Sampled(layout, torch.cat(present, out=tray.empty(sum(map(len, present)), dtype)))
