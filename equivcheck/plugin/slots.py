"""A limit on the processes that all workers of a session start together, kept by file locks.

The system gives a lock back when its holder dies, so a worker that is killed blocks nobody.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

PAUSE = 0.02  # seconds between two looks at locks that others hold


@contextmanager
def taken(folder: Path, count: int, limit: int) -> Iterator[None]:
    """Hold `count` of `limit` places while the block runs; wait for them first.

    Args:
        folder: Common to all that share the limit.
        count: At most `limit`.
        limit: The same for all.
    """
    if sys.platform == "win32":  # without fcntl; the limit then holds for each worker alone
        yield
        return
    with ExitStack() as held:
        # One at a time gathers places: two that each hold half of them would wait for ever.
        with (folder / "ranks.gate").open("w") as gate:
            _lock(gate)
            while count:
                for place in range(limit):
                    if count and _try(held, folder / f"ranks.{place}"):
                        count -= 1
                if count:
                    time.sleep(PAUSE)
        yield


def _lock(stream: IO[str]) -> None:
    import fcntl  # noqa: PLC0415 - not there on every system

    fcntl.flock(stream, fcntl.LOCK_EX)


def _try(held: ExitStack, path: Path) -> bool:
    """Take one place if it is free; a second lock of one's own process counts as taken, too."""
    import fcntl  # noqa: PLC0415 - as above

    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        return False
    held.callback(stream.close)
    return True
