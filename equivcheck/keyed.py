"""Randomness keyed by the sample: a sample gets the same mask whatever batch it sits in.

Below autograd, every operator that draws is run once for each sample of the micro-batch in use, on that sample's rows,
from a seed made of the sample and the number of the call. It covers what draws a tensor with the samples along one
dimension: dropout in all its forms, attention dropout, drop-path, noise from `rand*`, `randn*`, `normal_`, `bernoulli`.
It does not cover one draw for a whole batch, a generator of the loop's own, or numpy: those stay random, and a
difference that they make is EQ602.

The number of a call is read off torch's own generator, which starts alike for each micro-batch and advances by one
draw with each call. Activation checkpointing sets that generator back, so that what is computed again is masked alike.

B samples, m rows of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from equivcheck.entropy import seed_torch
from equivcheck.feed import Key
from equivcheck.split import tensors_in

Way = tuple[int, int]
"""The dimension that holds the samples, and the rows of each."""

# How each call was keyed in the full batch, by its number: a shape that fits by chance does not fit a micro-batch too.
_ways: dict[int, Way | None] = {}


class KeyedRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws for each sample by itself.

    Args:
        seed: Of the case; the same in all its runs.
        offset: Added to the seed of what is not keyed.
        first: Whether this is the full-batch run that says how each call is keyed.
    """

    def __init__(self, seed: int, offset: int, *, first: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.unkeyed = False
        self._seed, self._offset = seed, offset
        self._served: dict[int, list[Key]] = {}
        self._held: list[Any] = []
        self._keys: tuple[Key, ...] = ()
        self._latest: tuple[Key, ...] = ()
        self._used: tuple[Key, ...] = ()
        self._entered: dict[tuple[Key, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._states: dict[tuple[Key, ...], torch.Tensor] = {}
        if first:
            _ways.clear()

    def served(self, keys: Sequence[Key], micro_batch: Any, *, is_next: bool = False) -> None:
        """Remember which samples the tensors of a micro-batch hold.

        Args:
            keys: The samples.
            micro_batch: What the loop is given.
            is_next: If the one before it was used, it is done with: what is drawn now is drawn for this one.
        """
        self._held.append(micro_batch)  # Another tensor must not get the address of one of these.
        for tensor in tensors_in(micro_batch):
            self._served[_address(tensor)] = list(keys)
        if not self._keys or (is_next and self._used == self._latest):
            self._touch(tuple(keys))
        self._latest = tuple(keys)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operator; one that draws, sample by sample."""
        kwargs = kwargs or {}
        given = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
        for tensor in given:
            keys = self._served.get(_address(tensor))
            if keys is not None:
                self._used = tuple(keys)
                self._touch(self._used)
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.unkeyed = True
            return func(*args, **kwargs)
        call = int(torch.randint(2**62, ()).item())
        after = torch.get_rng_state()
        try:
            return self._draw(func, args, kwargs, call)
        finally:
            torch.set_rng_state(after)

    def _touch(self, keys: tuple[Key, ...]) -> None:
        """Go on with the calls of the micro-batch that is used now.

        Checkpointing notes the generator's state before the forward that it wraps touches the micro-batch, and sets it
        back to that before it computes again, in a backward: the same step leads on from there.
        """
        if torch._C._current_graph_task_id() != -1:  # no public way to ask
            self._keys = keys
            state = torch.get_rng_state()
            for before, after in self._entered.get(keys, ()):
                if torch.equal(before, state):
                    torch.set_rng_state(after)
            return
        if keys == self._keys:
            return
        before = torch.get_rng_state()
        self._states[self._keys] = before
        if keys in self._states:
            torch.set_rng_state(self._states[keys])
        else:
            seed_torch(_hash(self._seed))
        self._entered.setdefault(keys, []).append((before, torch.get_rng_state()))
        self._keys = keys

    def _draw(self, func: Any, args: Any, kwargs: Any, call: int) -> Any:
        count = len(self._keys)
        shape = _shape(func, args)
        way = _way(shape, count)
        if call not in _ways:
            _ways[call] = way
        if way is None or _ways[call] != way:
            self.unkeyed = True
            seed_torch(_hash(self._seed, call, self._offset, *self._keys))
            return func(*args, **kwargs)
        assert shape is not None
        dimension, rows = way
        parts = []
        for index, key in enumerate(self._keys):
            seed_torch(_hash(self._seed, call, key))
            start = index * rows

            def mine(leaf: Any, start: int = start) -> Any:
                whole = isinstance(leaf, torch.Tensor) and leaf.shape == shape
                return leaf.narrow(dimension, start, rows) if whole else leaf

            if _takes_size(func):
                size = [*shape[:dimension], rows, *shape[dimension + 1 :]]
                parts.append(func(*_with_size(args, size), **kwargs))
            else:
                parts.append(func(*tree_map(mine, args), **tree_map(mine, kwargs)))
        if func._schema.is_mutable:  # the parts are views of what is written
            return args[0]
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(each, dimension) for each in zip(*parts, strict=True))
        return torch.cat(parts, dimension)


@contextmanager
def keyed_random(mode: KeyedRandom) -> Iterator[KeyedRandom]:
    """Key what is drawn meanwhile; unless something could not be, torch's generator is left as it was."""
    before = torch.get_rng_state()
    with mode:
        yield mode
    if not mode.unkeyed:
        torch.set_rng_state(before)


def _address(tensor: torch.Tensor) -> int:
    try:
        return int(tensor.untyped_storage().data_ptr())
    except (
        RuntimeError,
        NotImplementedError,
    ):  # sparse ones, and wrappers without memory of their own
        return -1


def _hash(*parts: Any) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _takes_size(func: Any) -> bool:
    return any(each.name == "size" for each in func._schema.arguments)


def _with_size(args: Sequence[Any], size: list[int]) -> list[Any]:
    """Return the arguments with another size: the only list of numbers among them."""
    return [size if isinstance(each, (list, tuple, torch.Size)) else each for each in args]


def _shape(func: Any, args: Sequence[Any]) -> torch.Size | None:
    """Return the shape of what is drawn, or None where it is another than that of an argument."""
    if _takes_size(func):
        sizes = [each for each in args if isinstance(each, (list, tuple, torch.Size))]
        return torch.Size(sizes[0]) if sizes else None
    tensors = [each for each in args if isinstance(each, torch.Tensor)]
    return tensors[0].shape if tensors else None


def _way(shape: torch.Size | None, count: int) -> Way | None:
    """Return where the samples are: B along a dimension, or B times m rows along the first of several."""
    if shape is None or not shape or not count:
        return None
    for dimension, size in enumerate(shape[:2]):
        if size == count:
            return dimension, 1
    if len(shape) > 1 and shape[0] and shape[0] % count == 0:
        return 0, shape[0] // count
    return None
