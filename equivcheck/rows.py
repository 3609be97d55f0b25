"""The rows of a case that uses some of the samples only, as text: `0:0-4+7,1:2`.

Full batches stand between commas, in order; each names the batch it comes from and, behind a colon, its rows: runs
such as `0-4` (both ends count) and single ones, joined by plus signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from equivcheck.errors import UsageError

Rows = list[tuple[int, list[int]]]
EXPECTED = "batches and their rows, as in 0:0-4+7,1:2"
_BATCH = re.compile(r"(\d+):(\d+(?:-\d+)?(?:\+\d+(?:-\d+)?)*)")


def parse(text: str) -> Rows:
    """Return, for every full batch, which one its rows come from, and which rows, in the order stated.

    Raises:
        UsageError: It is no such text, a run goes backwards, or a row is named twice.
    """
    found: Rows = []
    for part in text.replace(" ", "").split(","):
        match = _BATCH.fullmatch(part)
        rows = list(_expanded(match[2])) if match else []
        if match is None or not rows or len(set(rows)) < len(rows):
            raise UsageError(f"rows is {text!r}", where=part or None, expected=EXPECTED)
        found.append((int(match[1]), rows))
    return found


def written(rows: Sequence[tuple[int, Sequence[int]]]) -> str:
    """Return the shortest text that `parse` reads as these rows."""
    return ",".join(f"{batch}:{'+'.join(_runs(chosen))}" for batch, chosen in rows)


def _expanded(text: str) -> Iterator[int]:
    for run in text.split("+"):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _runs(rows: Sequence[int]) -> Iterator[str]:
    start = 0
    for index in range(1, len(rows) + 1):
        if index == len(rows) or rows[index] != rows[index - 1] + 1:
            first, last = rows[start], rows[index - 1]
            yield str(first) if first == last else f"{first}-{last}"
            start = index
