"""Find the process group that this process was started in, as torchrun and other launchers tell it by variables."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from equivcheck.errors import UsageError

NEEDED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a launcher sets for its processes; a full batch runs without, as in a process that nobody launched.
ONES: Final = (
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
)
_PREFIX: Final = "TORCHELASTIC_"


@dataclass(frozen=True)
class Launch:
    """One process of a group that a launcher has started.

    Attributes:
        rank, world_size: r and R.
        address, port: Where the group meets: its store.
        environment: The variables that the launcher has set for this process.
    """

    rank: int
    world_size: int
    address: str
    port: int
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def attempt(self) -> str:
        """Number of the launcher's attempt: a store may outlive one that failed."""
        return self.environment.get("TORCHELASTIC_RESTART_COUNT", "0")


def found(environment: MutableMapping[str, str] | None = None) -> Launch | None:
    """Return what a launcher told this process; None if it is on its own.

    Args:
        environment: Variables to read, `os.environ` by default.

    Raises:
        UsageError: A number is none.
    """
    variables = os.environ if environment is None else environment
    if not all(variables.get(name) for name in NEEDED) or variables["WORLD_SIZE"] == "1":
        return None
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        try:
            numbers[name] = int(variables[name])
        except ValueError:
            raise UsageError(
                f"launcher: {name} is {variables[name]!r}",
                expected="a whole number, as torchrun sets it",
                fix=f"unset {name}, to run without a launcher",
            ) from None
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise UsageError(
            f"launcher: RANK is {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']}",
            expected="ranks from 0 up to one below the world size",
            fix="unset RANK and WORLD_SIZE, to run without a launcher",
        )
    told = {k: v for k, v in variables.items() if k in (*NEEDED, *ONES) or k.startswith(_PREFIX)}
    told.setdefault("LOCAL_RANK", str(numbers["RANK"]))
    told.setdefault("LOCAL_WORLD_SIZE", str(numbers["WORLD_SIZE"]))
    return Launch(
        numbers["RANK"],
        numbers["WORLD_SIZE"],
        variables["MASTER_ADDR"],
        numbers["MASTER_PORT"],
        told,
    )


@contextmanager
def alone(launch: Launch) -> Iterator[None]:
    """Take away what the launcher has told: the full batch runs in one process that belongs to no group."""
    kept = {name: os.environ.pop(name) for name in launch.environment if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
