"""Serve the user's batches to one run: full batches, micro-batches, single ones or permuted ones.

Every row of every full batch is a *sample* with a number. A feed notes each sample as it is handed out, so that
optimizer steps are matched by what they consumed and never by position. A key is `(pass, sample)`: the second pass
over the same data hands out other keys.

N samples, K micro-batches per cycle, R ranks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.fetch import _MapDatasetFetcher

from equivcheck.errors import UsageError
from equivcheck.rows import parse
from equivcheck.split import rows_of, take, walk

Key = tuple[int, int]


@dataclass(frozen=True)
class Data:
    """The full batches of one case, read once.

    Attributes:
        batches: Full batches in order, any nesting; dimension 0 is the sample.
        rows: Rows of each full batch.
    """

    batches: list[Any]
    rows: list[int]

    @property
    def total(self) -> int:
        """N, the number of samples."""
        return sum(self.rows)

    def start(self, batch: int) -> int:
        """Return the number of a full batch's first sample."""
        return sum(self.rows[:batch])

    def locate(self, sample: int) -> tuple[int, int]:
        """Return the full batch of a sample and its row in it."""
        for batch, rows in enumerate(self.rows):
            if sample < rows:
                return batch, sample
            sample -= rows
        raise IndexError(sample)

    def full_batches(self) -> list[list[int]]:
        """Return the samples of every full batch."""
        return [
            list(range(self.start(batch), self.start(batch) + rows))
            for batch, rows in enumerate(self.rows)
        ]

    def shorter(self) -> Data:
        """Return the data without its last full batch."""
        return Data(self.batches[:-1], self.rows[:-1])

    @property
    def tail(self) -> set[int]:
        """The samples of incomplete cycles: of the last full batch, if it is shorter than the others."""
        return set(range(self.start(len(self.rows) - 1), self.total)) if self.has_tail else set()

    @property
    def has_tail(self) -> bool:
        """Whether the last full batch is shorter than every other."""
        return len(self.rows) > 1 and self.rows[-1] < min(self.rows[:-1])


# A generator without an end must not hang the run: after this many batches the rest is not looked at for a tail.
LOOK_AHEAD = 1000


def read_batches(
    batches: Callable[[], Iterable[Any]], optimizer_steps: int, rows: str | None = None
) -> Data:
    """Read the user's full batches once: the first `optimizer_steps`, and always a shorter last one.

    Args:
        batches: The user's function.
        optimizer_steps: Upper bound on full batches.
        rows: Which rows of those batches alone are used, see `rows.parse`.

    Raises:
        UsageError: Nothing was returned, or a batch has no rows, or its tensors disagree about them, or has not the
            rows asked for.
    """
    data = _read(batches, optimizer_steps)
    return data if rows is None else select(data, parse(rows))


def select(data: Data, chosen: Sequence[tuple[int, Sequence[int]]]) -> Data:
    """Return some rows of some batches as full batches of their own.

    Args:
        data: All there is.
        chosen: For each full batch of the result, which one its rows come from, and which rows.

    Raises:
        UsageError: There is no such batch or row.
    """
    for batch, rows in chosen:
        if batch >= len(data.rows) or max(rows) >= data.rows[batch]:
            raise UsageError(
                f"no-such-row: rows names row {max(rows)} of batch {batch}",
                expected=f"batches of {', '.join(map(str, data.rows))} rows, counted from 0",
            )
    return Data(
        [take(data.batches[batch], list(rows)) for batch, rows in chosen],
        [len(rows) for _, rows in chosen],
    )


def _read(batches: Callable[[], Iterable[Any]], optimizer_steps: int) -> Data:
    source = batches()
    if source is None or not hasattr(source, "__iter__"):
        raise UsageError(
            f"no-batches: batches() returned {type(source).__name__}",
            where="batches()",
            expected="an iterable of full batches, one per optimizer step",
            because="it is read once, batch after batch; nothing else says how many steps there are",
            fix="return [batch, batch, ...], or yield them",
        )
    if isinstance(source, (torch.Tensor, dict, str)):
        raise UsageError(
            f"no-batches: batches() returned one {type(source).__name__}, not a list of them",
            where="batches()",
            expected="an iterable of full batches, one per optimizer step",
            because="its rows or keys would be taken for batches",
            fix="return [batch]",
        )
    kept: list[Any] = []
    rows: list[int] = []
    last: tuple[Any, int] | None = None
    for index, batch in enumerate(source):
        if index >= LOOK_AHEAD:
            last = None
            break
        count = rows_of(batch, f"batches(), full batch {index}")
        if count == 0:
            raise UsageError(
                f"empty-batch: full batch {index} has 0 rows",
                where=f"batches(), full batch {index}",
                expected="at least one sample",
                because="an optimizer step without a sample has no gradient to compare",
                fix="leave the batch out",
            )
        if len(kept) < optimizer_steps:
            kept.append(batch)
            rows.append(count)
        else:
            last = (batch, count)
    if not kept:
        raise UsageError(
            "no-batches: batches() gave 0 batches",
            where="batches()",
            expected="at least one full batch",
            because="a generator that was used up gives none, as does a list that nothing was put into",
            fix="make the batches inside batches(), which is called anew for every run",
        )
    if last is not None and last[1] < min(rows):
        if len(kept) == optimizer_steps and optimizer_steps > 1:
            kept.pop()
            rows.pop()
        kept.append(last[0])
        rows.append(last[1])
    return Data(kept, rows)


@dataclass
class Feed:
    """What one run is served with, and what it took.

    Attributes:
        data: The full batches, in the arithmetic of the run.
        micro_batches: For each micro-batch the samples it holds, in order; all of one full batch.
        orders: For map-style access, the sample that stands at each position, for each pass over the data.
        on_fetch: Called with the keys of each micro-batch, or sample, before it is handed out.
        on_served: Called with the micro-batch itself.
        singly: Whether samples were taken one at a time, so that nothing tells which make up a micro-batch.
        on_again: Asked when samples are handed out again: whether all that was handed out before was only looked at.
        on_own: Called once, when the loop is seen to batch a data set that it made of all samples.
        own_length: Length of that data set, which an earlier run may have told; None if there is none.
    """

    data: Data
    micro_batches: list[list[int]]
    orders: list[list[int]] | None = None
    on_fetch: Callable[[list[Key]], None] = lambda _: None
    on_served: Callable[[Any], None] = lambda _: None
    _seen: Counter[int] = field(default_factory=Counter)
    singly: bool = False
    on_again: Callable[[], bool] = lambda: False
    on_own: Callable[[], None] = lambda: None
    own_length: int | None = None
    _own: Any = None
    _busy: bool = False

    def loader(self, length: int | None = None) -> DataLoader[Any]:
        """Return a loader over the micro-batches, whose `len` may be stated otherwise."""
        sampler = _Batches(self.micro_batches, length)
        # A generator of its own: making an iterator must not advance the one that the user's code draws from.
        generator = torch.Generator()
        return DataLoader(_Rows(self), batch_sampler=sampler, collate_fn=_same, generator=generator)

    def dataset(self) -> Dataset[Any]:
        """Return all samples, map-style, one without its batch dimension at each position."""
        return _Samples(self)

    def rows(self, samples: Sequence[int]) -> Any:
        """Hand out samples of one full batch as a micro-batch of its own storage."""
        places = [self.data.locate(sample) for sample in samples]
        batch = places[0][0]
        self._look_again(samples)
        self.on_fetch([self._key(sample) for sample in samples])
        served = take(self.data.batches[batch], [row for _, row in places])
        self.on_served(served)
        return served

    def sample(self, position: int) -> Any:
        """Hand out one sample, without its batch dimension."""
        self.singly = True
        return self.samples([position])[0]

    def samples(self, positions: Sequence[int]) -> list[Any]:
        """Hand out the samples of one micro-batch, each without its batch dimension."""
        if not self._busy and len(positions) > 1:
            self._look_again(positions)
        keys = [self._key_at(position) for position in positions]
        if not self._busy:
            self.on_fetch(keys)
        return [self._one(sample) for _, sample in keys]

    def _look_again(self, samples: Sequence[int]) -> None:
        """Forget what was handed out, where a loop begins anew: it took a batch before, to learn its shapes, say."""
        if any(sample in self._seen for sample in samples) and self.on_again():
            self._seen.clear()

    def _key_at(self, position: int) -> Key:
        """Return the key of the sample that stands at a position in this pass over the data."""
        if not -self.data.total <= position < self.data.total:
            raise IndexError(position)
        position %= self.data.total
        passed, _ = self._key(position)
        if not self.orders or self.own_length is not None:
            return passed, position
        return passed, self.orders[min(passed, len(self.orders) - 1)][position]

    @contextmanager
    def watching_own(self) -> Iterator[None]:
        """See the batches of a data set that the loop made of all samples: trainers copy them into tables of their own.

        Its rows are the samples then, numbered as it numbers them, whatever it made of ours (packed them, say). A row
        that stands in a batch several times, and a batch that a loader yields several times in a row, are the same
        samples again and no further pass over the data: trainers that draw several answers to a prompt work so.
        """
        last: tuple[Any, list[int], list[Key]] | None = None
        original: Callable[[Any, Any], Any] = _MapDatasetFetcher.fetch

        @functools.wraps(original)
        def fetch(fetcher: Any, index: Any) -> Any:
            if self._busy or not isinstance(index, list) or not self._is_own(fetcher.dataset):
                return original(fetcher, index)
            nonlocal last
            if last is None or last[0] is not fetcher or last[1] != index:
                self._look_again(index)
                known = {each: self._own_key(each) for each in dict.fromkeys(index)}
                last = fetcher, list(index), [known[each] for each in index]
            keys = last[2]
            self.on_fetch(list(keys))
            self._busy = True
            try:
                return original(fetcher, [sample for _, sample in keys])
            finally:
                self._busy = False

        setattr(_MapDatasetFetcher, "fetch", fetch)  # noqa: B010 - a plain assignment is refused by mypy
        try:
            yield
        finally:
            setattr(_MapDatasetFetcher, "fetch", original)  # noqa: B010

    @property
    def has_own(self) -> bool:
        """Whether the loop batched a data set that it made of all samples."""
        return self._own is not None

    def _is_own(self, dataset: Any) -> bool:
        if self._own is None:
            if isinstance(dataset, _Rows | _Samples) or not self._taken_whole():
                return False
            self._own, self.own_length, self.singly = dataset, self._length(dataset), False
            self._seen.clear()
            self.on_own()
        # Keras makes its data set anew, class and all, for every iterator.
        return dataset is self._own or (
            type(dataset).__qualname__ == type(self._own).__qualname__
            and self._length(dataset) == self.own_length
        )

    def _length(self, dataset: Any) -> int:
        """Return how many rows a data set of the loop's own has: as many as there are samples, if it cannot say."""
        try:
            return len(dataset)
        except TypeError:
            return self.data.total

    def _taken_whole(self) -> bool:
        """Return whether every sample was taken, one at a time."""
        return self.singly and len(self._seen) == self.data.total

    def _own_key(self, position: int) -> Key:
        assert self.own_length is not None
        passed, _ = self._key(position % self.own_length)
        if not self.orders:
            return passed, position
        return passed, self.orders[min(passed, len(self.orders) - 1)][position]

    def _one(self, sample: int) -> Any:
        batch, row = self.data.locate(sample)
        return walk(_first_row, "batch", take(self.data.batches[batch], [row]))

    def _key(self, sample: int) -> Key:
        count = self._seen[sample]
        self._seen[sample] += 1
        return count, sample


class _Batches:
    """The batch sampler: which samples make up each micro-batch."""

    def __init__(self, micro_batches: list[list[int]], length: int | None) -> None:
        self._micro_batches = micro_batches
        self._length = length

    def __iter__(self) -> Any:
        return iter(self._micro_batches)

    def __len__(self) -> int:
        return len(self._micro_batches) if self._length is None else self._length


class _Rows(Dataset[Any]):
    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __getitem__(self, position: int) -> Any:
        return self._feed.sample(position)

    def __getitems__(self, samples: list[int]) -> Any:
        return self._feed.rows(samples)

    def __len__(self) -> int:
        return self._feed.data.total


class _Samples(Dataset[Any]):
    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    def __getitem__(self, position: int) -> Any:
        return self._feed.sample(position)

    def __getitems__(self, positions: list[int]) -> list[Any]:
        # A DataLoader asks for all samples of a batch at once where a dataset can give them: so its batches are known.
        return self._feed.samples(positions)

    def __len__(self) -> int:
        return self._feed.data.total


def _same(batch: Any) -> Any:
    return batch


def _first_row(_path: str, leaf: Any) -> Any:
    """Return a tensor or array of one row without its batch dimension, anything else as it is."""
    return leaf[0] if isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim else leaf
