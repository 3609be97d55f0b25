"""How the full batches of one case are cut: which samples each rank consumes in each micro-step."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.feed import Data
from equivcheck.split import plan


class Cuts:
    """The micro-batches of a case.

    Args:
        case: Its K, split and ranks.
        rows: Rows of each full batch.

    Raises:
        UsageError: A batch has fewer rows than micro-batches.
    """

    def __init__(self, case: Case, rows: list[int]) -> None:
        self._case = case
        self._rows = rows
        self._plan = self._of(case.accumulation_steps)

    def _of(self, accumulation_steps: int) -> list[list[list[tuple[int, int]]]]:
        """Return [cycle][rank][micro_step] = first and last row."""
        return plan(
            self._rows,
            accumulation_steps,
            self._case.split,
            self._case.world_size,
            every_rank_all=self._case.shares < self._case.world_size,
        )

    def slices(
        self, data: Data, accumulation_steps: int | None = None
    ) -> list[list[tuple[int, int]]]:
        """Return, per full batch, the first and last row of every micro-batch: of rank 0, then of rank 1 ..."""
        cycles = self._plan if accumulation_steps is None else self._of(accumulation_steps)
        shares = self._case.shares
        return [
            [each for rank in cycle[:shares] for each in rank] for cycle in cycles[: len(data.rows)]
        ]

    def micro_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-batch."""
        return [
            [data.start(batch) + row for row in range(start, stop)]
            for batch, slices in enumerate(self.slices(data))
            for start, stop in slices
        ]

    def of_rank(self, data: Data, rank: int) -> list[list[int]]:
        """Return the samples of every micro-batch of one rank."""
        return [
            [data.start(batch) + row for row in range(start, stop)]
            for batch, cycle in enumerate(self._plan[: len(data.rows)])
            for start, stop in cycle[rank]
        ]

    def micro_steps(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-step: of all ranks together."""
        return [
            [data.start(batch) + row for start, stop in same for row in range(start, stop)]
            for batch, cycle in enumerate(self._plan[: len(data.rows)])
            for same in zip(*cycle, strict=True)
        ]

    def turned(self, data: Data, by: int) -> list[list[int]]:
        """Return the samples of every micro-batch, with the first `by` of every cycle moved to its end."""
        found: list[list[int]] = []
        for batch, slices in enumerate(self.slices(data)):
            start, turn = data.start(batch), by % len(slices)
            for first, last in [*slices[turn:], *slices[:turn]]:
                found.append([start + row for row in range(first, last)])
        return found

    def dealt(self, taken: list[list[int]]) -> list[int]:
        """Return samples cycle by cycle, in each those of rank 0, then those of rank 1 ...

        Args:
            taken: Of each rank, the samples in the order in which it takes them.
        """
        cycle = self.largest * self._case.accumulation_steps
        longest = max((len(samples) for samples in taken), default=0)
        return [
            sample
            for start in range(0, longest, cycle)
            for samples in taken
            for sample in samples[start : start + cycle]
        ]

    @property
    def largest(self) -> int:
        """Rows of the largest micro-batch."""
        return max(
            stop - start
            for cycle in self._plan
            for rank in cycle[: self._case.shares]
            for start, stop in rank
        )


def refuse_uneven(case: Case, wants: Collection[str], location: str) -> None:
    """Refuse uneven slices of a `train` that batches by itself.

    Args:
        case: Says how full batches are cut.
        wants: The arguments that `train` asks for.
        location: Of the subject.

    Raises:
        UsageError: It would have to be given slices of several sizes.
    """
    named = _batching(wants)
    if named and case.split != "even":
        raise UsageError(
            f"uneven-split: train takes {' and '.join(named)}: slices of one size",
            where=location,
            expected="--split even",
            because="a framework that batches by itself cannot be given uneven slices",
        )


def refuse_remainders(
    case: Case, wants: Collection[str], rows: Sequence[int], location: str
) -> None:
    """Refuse a number of slices that does not divide the full batches of a `train` that batches by itself.

    Args:
        case: Its K and ranks.
        wants: The arguments that `train` asks for.
        rows: Rows of every full batch; a last one that is shorter may have any number.
        location: Of the subject.

    Raises:
        UsageError: A full batch is no multiple of its number of slices.
    """
    named = _batching(wants)
    k = case.accumulation_steps * case.shares
    tail = len(rows) > 1 and rows[-1] < min(rows[:-1])
    for index, count in enumerate(rows[:-1] if tail else rows):
        if named and count % k:
            fitting = next(d for d in range(2, count + 1) if count % d == 0)
            raise UsageError(
                f"indivisible-batch: full batch {index} has {count} rows, not a multiple of {k}",
                where=location,
                expected=f"rows divisible by {k}, because train takes {' and '.join(named)}",
                fix=f"--accumulation-steps {fitting}",
                because=f"{case.accumulation_steps} micro-batches on each of {case.shares} ranks"
                if case.shares > 1
                else None,
            )


def _batching(wants: Collection[str]) -> list[str]:
    """Return the arguments by which a `train` batches by itself."""
    return sorted({"dataset", "micro_batch_size"} & set(wants))
