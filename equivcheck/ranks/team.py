"""The processes of R ranks: started together, ended together, kept for the next case where nothing went wrong."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection as connections
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from equivcheck.ranks import group, wire
from equivcheck.ranks.hosts import hosts
from equivcheck.ranks.links import Link, Local
from equivcheck.ranks.status import Board
from equivcheck.ranks.worker import Failure, Setup

if TYPE_CHECKING:
    from equivcheck.recording import Recording
    from equivcheck.subject import Subject

# A loop that makes process groups of its own leaves them behind, run after run: each has threads and connections.
GROUPS: Final = 8
# What a rank has issued is read from torch's flight recorder after each run, which keeps all of it: 0.04 s for 1,000
# collectives, 0.4 s for 5,000 (torch 2.13, one process). New processes cost 0.1 s to 0.3 s.
ISSUED: Final = 1_000


@dataclass
class Rank:
    """One rank, and what it has said in this run.

    Attributes:
        link: The way to it.
        failure: Why it could not finish.
        died: How its process ended; None while it lives.
        done: Its recording, and what interventions gathered.
        ready: It has joined the group.
        answer: The user's running frames, innermost first, and how many collectives it has issued.
        traffic: After its last run, how many collectives it has issued, and in how many groups.
    """

    link: Link
    failure: Failure | None = None
    died: int | None = None
    done: tuple[Recording, list[Any]] | None = None
    ready: bool = False
    answer: tuple[list[str], int] | None = None
    traffic: tuple[int, int] = (0, 1)


class Team:
    """R rank processes, with the files that they share with their parent.

    Args:
        world_size: R.
        device: "cpu" or "cuda".

    Attributes:
        ranks: One each.
        number: Of the run under way: every run of these processes has its own.
    """

    def __init__(self, world_size: int, device: str) -> None:
        self.world_size, self.device = world_size, device
        self.number = 0
        self._subjects = 0
        self._folder = tempfile.TemporaryDirectory(prefix="equivcheck-ranks-")
        self._arena: wire.Arena | None = None
        self._board = Board(Path(self._folder.name) / "board", world_size)
        self.ranks = [Rank(link) for link in self._links(Path(self._folder.name))]

    def _links(self, folder: Path) -> Sequence[Link]:
        launched = hosts()
        if launched is not None:
            return launched.links(folder, self._board, self.device)
        port = group.free_port()
        found = []
        for rank in range(self.world_size):
            variables = group.environment(
                rank, self.world_size, rank, self.world_size, "127.0.0.1", port
            )
            if "GLOO_SOCKET_IFNAME" not in os.environ and sys.platform == "linux":
                variables["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of this machine's name
            setup = Setup(
                folder=str(folder),
                rank=rank,
                world_size=self.world_size,
                environment=variables,
                search_path=list(sys.path),
                cwd=str(Path.cwd()),
                device=self.device,
                slot=rank,
            )
            found.append(Local(setup, self._board))
        return found

    def take_up(self, subject: Subject) -> None:
        """Let the ranks serve another subject, with tensors of its own."""
        self._drop_arena()
        self._subjects += 1
        self._arena = wire.Arena(Path(self._folder.name) / f"arena-{self._subjects}")
        place = (list(sys.path), str(Path.cwd())) if hosts() is None else None
        message = wire.dumps(("subject", 0, subject, self._arena.path.name, place))
        for each in self.ranks:
            each.link.send(message)

    def send(self, *content: Any) -> None:
        """Send the same to all ranks; large tensors are left in the arena, each once."""
        assert self._arena is not None
        self.number += 1
        for each in self.ranks:
            each.done = each.failure = each.answer = None
        message = self._arena.dumps(("run", self.number, *content))
        for each in self.ranks:
            each.link.share(self._arena.path)
            each.link.send(message)

    def hear(self, seconds: float) -> None:
        """Take what ranks say within so many seconds; return after the first."""
        pending = [each for each in self.ranks if each.died is None]
        connections.wait([thing for each in pending for thing in each.link.objects()], seconds)
        for each in pending:
            for message in each.link.messages():
                self._take(each, message)
            each.died = each.link.exit_code

    def _take(self, rank: Rank, message: bytes) -> None:
        kind, number, content = wire.loads(message)
        if kind == "ready":
            rank.ready = True
        elif number != self.number:
            return
        elif kind == "where":
            rank.answer = content
        elif kind == "done":
            *done, rank.traffic = content
            rank.done = (done[0], done[1])
        else:
            rank.failure = content

    def activity(self) -> tuple[Any, ...]:
        """Return something that changes while any rank computes or gets on."""
        links = [each.link for each in self.ranks]
        return tuple((each.standing().events, each.processor_time()) for each in links)

    @property
    def is_sound(self) -> bool:
        """Whether all ranks are where the others are: a later case would find nothing that this one has left."""
        traffic = {each.traffic for each in self.ranks}
        return (
            all(each.failure is None and each.died is None for each in self.ranks)
            and len({each.done is None for each in self.ranks}) == 1
            and len(traffic) == 1
            and all(issued <= ISSUED and groups <= GROUPS for issued, groups in traffic)
        )

    def rest(self) -> None:
        """Let go of what a case has left in the files."""
        for each in self.ranks:
            each.done = None
        self._drop_arena()

    def _drop_arena(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena.path.unlink(missing_ok=True)
            self._arena = None

    def close(self) -> None:
        """End every rank, with what it has started, and remove the files."""
        for each in self.ranks:
            each.link.end()
        for each in self.ranks:
            each.link.close()
        self._board.close()
        self._drop_arena()
        self._folder.cleanup()


# ---- from one case to the next -----------------------------------------------------------------

_resting: dict[tuple[int, str], Team] = {}
_keepers = 0


@contextmanager
def kept() -> Iterator[None]:
    """Keep ranks from one case to the next; those that are left at the end of the block are ended."""
    global _keepers  # noqa: PLW0603 - a process has one fork server, and its ranks
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        while not _keepers and _resting:
            _resting.popitem()[1].close()


def taken(world_size: int, device: str) -> Team:
    """Return ranks for one case: some that are there, or new ones."""
    return _resting.pop((world_size, device), None) or Team(world_size, device)


def given_back(team: Team) -> None:
    """Keep the ranks of a case for the next if they are sound; end them otherwise."""
    key = team.world_size, team.device
    if _keepers and team.is_sound and key not in _resting:
        team.rest()
        _resting[key] = team
    else:
        team.close()
