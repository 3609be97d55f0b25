"""The process group of a rank: joined before the user's code runs, and never left.

A loop as people write it calls `init_process_group` itself, or expects that somebody did; here both find the group that
is there. `destroy_process_group` does nothing: torch 2.13 deadlocks in a third of the runs in which a
`DistributedDataParallel` outlives its group, so a rank ends by `os._exit`, with its group.
"""

from __future__ import annotations

import functools
import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from equivcheck.recording import Collective

# The parent watches the ranks and ends them; gloo's own limit must not come first.
NEVER = timedelta(days=1)
# Entries that the flight recorder keeps: eight steps of a few hundred parameters, sent one by one.
FLIGHT_ENTRIES = 20_000

_BYTES = {
    "Float": 4,
    "Double": 8,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
    "ComplexFloat": 8,
    "ComplexDouble": 16,
}


def environment(
    rank: int, world_size: int, local_rank: int, local_world_size: int, address: str, port: int
) -> dict[str, str]:
    """Return the variables that launchers set and frameworks read."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "GROUP_RANK": str(rank // local_world_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "TORCH_FR_BUFFER_SIZE": str(FLIGHT_ENTRIES),
    }


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join(rank: int, world_size: int, device: str, store: Store) -> None:
    """Join the group of this run's ranks, and let the user's own calls find it.

    Args:
        rank: r.
        world_size: R.
        device: "cpu" is gloo; "cuda" nccl, with gloo for what lies on the cpu, if every rank has a GPU of its own.
        store: Where the ranks meet.
    """
    backend = backend_of(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=NEVER)
    _keep()


def backend_of(device: str) -> str:
    """Return the backend by what is there: nccl wants a GPU for each rank of this machine, gloo takes what it gets."""
    if device == "cpu":
        return "gloo"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    enough = dist.is_nccl_available() and torch.cuda.device_count() >= here
    return "cpu:gloo,cuda:nccl" if enough else "gloo"


def meet(folder: Path, world_size: int) -> Store:
    """Return a store in a folder that all ranks of one machine share."""
    return FileStore(str(folder / "rendezvous"), world_size)


def meet_at(address: str, port: int, prefix: str) -> Store:
    """Return the store of a launched group, under names of these ranks' own."""
    store = TCPStore(address, port, is_master=False, wait_for_workers=False)
    return PrefixStore(prefix, store)


def _keep() -> None:
    original = dist.init_process_group

    @functools.wraps(original)
    def init_process_group(*_args: Any, **_kwargs: Any) -> None:
        """Find the group that is there already."""

    @functools.wraps(dist.destroy_process_group)
    def destroy_process_group(*_args: Any, **_kwargs: Any) -> None:
        """Leave the group to the end of the process."""

    modules: tuple[Any, ...] = (dist, distributed_c10d)
    for module in modules:
        module.init_process_group = init_process_group
        module.destroy_process_group = destroy_process_group


def issued() -> int:
    """Return the number of collectives that this rank has issued, over all of its groups."""
    total = 0
    groups: list[Any] = list(distributed_c10d._world.pg_map)
    for group in groups:
        try:
            total += int(group._get_sequence_number_for_group())
        except RuntimeError:  # A backend without numbers.
            continue
    return total


def count() -> int:
    """Return the number of groups that this rank belongs to, those of the user's code among them."""
    return len(distributed_c10d._world.pg_map)


def flight(since: int) -> list[Collective]:
    """Return the collectives issued since a time, in order, from torch's flight recorder.

    Args:
        since: Nanoseconds, as of `time.time_ns`.
    """
    found = []
    for entry in _recorded():
        at = int(entry["time_created_ns"])
        if at >= since:
            kind = str(entry["profiling_name"]).rpartition(":")[2]
            found.append(
                Collective(
                    kind=kind,
                    bytes=_size(entry["input_sizes"], entry["input_dtypes"]),
                    group=str(entry["process_group"][0]),
                    at=at,
                )
            )
    return sorted(found, key=lambda each: each.at)


def _recorded() -> Iterator[dict[str, Any]]:
    """Yield the entries of torch's flight recorders: gloo has one, nccl another; torch < 2.7 has none for gloo."""
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            yield from json.loads(dump()).get("entries", ())


def _size(shapes: list[list[int]], dtypes: list[str]) -> int:
    total = 0
    for shape, dtype in zip(shapes, dtypes, strict=False):
        count = 1
        for each in shape:
            count *= each
        total += count * _BYTES.get(dtype, 4)
    return total
