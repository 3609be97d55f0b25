"""Where each rank stands, in a few bytes that the parent can read when the rank itself says nothing more."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

# optimizer step, micro-step, backwards, counter of events, run, state
_FORM = struct.Struct("<6q")
SLOT = 64
RUNNING, RETURNED, IDLE = 1, 2, 0


@dataclass(frozen=True)
class Standing:
    """Where a rank stands.

    Attributes:
        optimizer_step: Optimizer steps it has completed: the index of the one under way.
        micro_step: Micro-batches it has fetched since, less one; -1 before the first.
        backwards: Root backwards so far.
        events: Counts up with everything that is seen; a rank that hangs does not count.
        run: Number of the run.
        state: RUNNING, RETURNED from `train`, or IDLE.
    """

    optimizer_step: int
    micro_step: int
    backwards: int
    events: int
    run: int
    state: int


class Board:
    """The standings of all ranks, shared through a mapped file.

    Args:
        path: The file.
        ranks: R; given by the side that makes the file.
    """

    def __init__(self, path: Path, ranks: int | None = None) -> None:
        if ranks is not None:
            path.write_bytes(bytes(SLOT * ranks))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    def write(self, rank: int, standing: Standing) -> None:
        """Set where a rank stands."""
        _FORM.pack_into(
            self._map,
            rank * SLOT,
            standing.optimizer_step,
            standing.micro_step,
            standing.backwards,
            standing.events,
            standing.run,
            standing.state,
        )

    def read(self, rank: int) -> Standing:
        """Return where a rank stands."""
        return Standing(*_FORM.unpack_from(self._map, rank * SLOT))

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
