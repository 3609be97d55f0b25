"""Look for the smallest case in which a subject fails: over cuts, tails, ranks and rows of its own batches.

First the cases as the user would run them, then small batches of every size up to a few rows with every K, with and
without a tail, then drawn ones. The first that fails is shrunk: fewer optimizer steps, a smaller K, fewer ranks, an
even cut, fewer rows, each kept as long as the case still fails in the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from equivcheck import result as results
from equivcheck.api import Job, outcomes
from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.rows import Rows, written

# Beyond these a case is no longer small; larger ones are drawn.
LARGEST_ROWS = 6
LARGEST_K = 9


@dataclass(frozen=True)
class Point:
    """One case of the search, without what all of them share.

    Attributes:
        rows: For every full batch, the batch it comes from and its rows; None for all batches as they are.
        accumulation_steps: K.
        split: How a full batch is cut.
        world_size: Ranks.
        strategy: How they work together.
    """

    rows: tuple[tuple[int, tuple[int, ...]], ...] | None
    accumulation_steps: int
    split: str = "even"
    world_size: int = 1
    strategy: str = "none"

    @property
    def size(self) -> tuple[int, int, int, bool]:
        """What shrinking makes smaller, most important first: steps, rows with K, ranks, and the cut."""
        rows = self.rows or ()
        total = sum(len(chosen) for _, chosen in rows)
        return len(rows), total + self.accumulation_steps, self.world_size, self.split != "even"


@dataclass
class Search:
    """One search.

    Attributes:
        subject: Code under test.
        template: A case with everything that all points share.
        sizes: Rows of the user's full batches.
        expect: Causes that are no failure.
        timeout: For one case, in seconds.
        budget: Most cases to run before one fails, and most to shrink it.
        progress: Told each case that begins.
        ran: Finished cases by point; None for one that cannot be planned.
    """

    subject: Any
    template: Case
    sizes: list[int]
    accumulation_steps: Sequence[int]
    splits: Sequence[str] = ("even", "uneven")
    worlds: Sequence[tuple[int, str]] = ((1, "none"),)
    expect: tuple[str, ...] = ()
    timeout: float | None = None
    budget: int = 100
    progress: Callable[[str], None] = lambda _: None
    ran: dict[Point, Mapping[str, Any] | None] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        """Yield cases without end: as the user runs them, then small ones, then drawn ones."""
        for world_size, strategy in self.worlds:
            for split in self.splits:
                for k in self.accumulation_steps:
                    yield Point(None, k, split, world_size, strategy)
        yield from self._small()
        yield from self.drawn(random.Random(self.template.seed))  # noqa: S311 - a choice of cases, no secret

    def _small(self) -> Iterator[Point]:
        """Yield batches of the first rows: every size, K and cut, and then with a tail after them."""
        largest = min(LARGEST_ROWS, max(self.sizes))
        for tail in (0, *range(1, largest)):
            for rows in range(max(2, tail + 1), largest + 1):
                batches = [self._first(0, rows)] + ([self._first(1, tail)] if tail else [])
                for k in range(2, rows + 1):
                    for world_size, strategy in self.worlds:
                        for split in self.splits:
                            yield Point(tuple(batches), k, split, world_size, strategy)

    def _first(self, number: int, count: int) -> tuple[int, tuple[int, ...]]:
        """Return so many first rows of a batch that has them; the same rows do for a second batch."""
        batch = number if number < len(self.sizes) and self.sizes[number] >= count else 0
        if self.sizes[batch] < count:
            batch = self.sizes.index(max(self.sizes))
        return batch, tuple(range(count))

    def drawn(self, rng: random.Random) -> Iterator[Point]:
        """Yield cases of any batches, rows, K, cut and ranks, without end."""
        while True:
            steps = rng.randint(1, min(3, len(self.sizes) + 1))
            batch = rng.randrange(len(self.sizes))
            count = rng.randint(1, self.sizes[batch])
            batches = []
            for number in range(steps):
                chosen = rng.choice([b for b, rows in enumerate(self.sizes) if rows >= count])
                size = rng.randint(1, count) if number and number == steps - 1 else count
                batches.append((chosen, tuple(sorted(rng.sample(range(self.sizes[chosen]), size)))))
            k = rng.randint(2, max(2, min(LARGEST_K, count)))
            world_size, strategy = rng.choice(self.worlds)
            yield Point(tuple(batches), k, rng.choice(self.splits), world_size, strategy)

    def run(self, point: Point) -> Mapping[str, Any] | None:
        """Return the finished case of a point; None where the contract has no such case."""
        if point not in self.ran:
            rows: Rows = [(batch, list(chosen)) for batch, chosen in point.rows or ()]
            case = replace(
                self.template,
                accumulation_steps=point.accumulation_steps,
                split=point.split,
                world_size=point.world_size,
                strategy=point.strategy,
                rows=written(rows) if rows else self.template.rows,
            )
            self.progress(case.label)
            try:
                [self.ran[point]] = outcomes(
                    [Job(self.subject, case, self.expect)], timeout=self.timeout
                )
            except UsageError:
                self.ran[point] = None
        return self.ran[point]

    def first_failure(self) -> Point | None:
        """Return the first point that diverges; else the first that raises; None if neither is found in the budget."""
        raised: Point | None = None
        tried = 0
        for point in self.points():
            # A drawn point may come twice, and in a tiny subject there is soon nothing new.
            tried += 1
            if len(self.ran) >= self.budget or tried > 10 * self.budget:
                break
            case = self.run(point)
            if case is None:
                continue
            code = results.case_exit_code(case)
            if code == 1:
                return point
            if code in (3, 70) and raised is None:
                raised = point
        return raised

    def shrunk(self, point: Point) -> Point:
        """Return the smallest point found that fails in the same way."""
        way = _way(self.run(point))
        left = len(self.ran) + self.budget
        if point.rows is None:
            everything = tuple((b, tuple(range(rows))) for b, rows in enumerate(self.sizes))
            point = replace(point, rows=everything)
        # The smallest points there are, before anything is taken away step by step.
        for other in [*self._small(), None]:
            if other is None or other.size >= point.size or len(self.ran) >= left:
                break
            if _way(self.run(other)) == way:
                point = other
                break
        smaller = True
        while smaller and len(self.ran) < left:
            smaller = False
            for other in self._smaller(point):
                if len(self.ran) >= left:
                    break
                if other.size < point.size and _way(self.run(other)) == way:
                    point, smaller = other, True
                    break
        return point

    def _smaller(self, point: Point) -> Iterator[Point]:
        rows = point.rows or ()
        for chosen in rows if len(rows) > 1 else ():
            yield replace(point, rows=(chosen,))
        for index in range(len(rows) if len(rows) > 1 else 0):
            yield replace(point, rows=rows[:index] + rows[index + 1 :])
        for k in range(2, point.accumulation_steps):
            yield replace(point, accumulation_steps=k)
        for world_size, strategy in self.worlds:
            if world_size < point.world_size:
                yield replace(point, world_size=world_size, strategy=strategy)
        if point.split != "even":
            yield replace(point, split="even")
        for index, (batch, used) in enumerate(rows):
            for kept in _fewer(used):
                yield replace(point, rows=(*rows[:index], (batch, kept), *rows[index + 1 :]))
        for kept in _fewer(rows[0][1]) if len(rows) > 1 else ():
            count = len(kept)  # all of them at once, or a shorter one would become a tail
            yield replace(point, rows=tuple((b, each[:count]) for b, each in rows))


def _fewer(rows: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield halves and quarters first, then all but one."""
    size = len(rows) // 2
    while size > 1:
        for start in range(0, len(rows) - size + 1, size):
            yield rows[start : start + size]
        size //= 2
    for index in reversed(range(len(rows) if len(rows) > 1 else 0)):
        yield rows[:index] + rows[index + 1 :]


def _way(case: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Return how a case fails: its first cause, or what it raises; None if it does not."""
    if case is None:
        return None
    code = results.case_exit_code(case)
    if code == 1:
        return (case["verdict"], *[cause["code"] for cause in case["causes"]][:1])
    if code in (3, 70):
        error = case.get("error") or {}
        return "error", *str(error.get("message", "")).split(": ")[
            :2
        ]  # as in train-raised: ValueError
    return None
