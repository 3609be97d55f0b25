"""Sharded data parallelism: every rank keeps a part of each parameter, gradient and optimizer state.

With or without communication during accumulation the sum is the same; what differs is traffic and memory.
"""

from __future__ import annotations

from typing import Any

from equivcheck.suite import Theory, Workload, divergent, equivalent, part

LOOPS = "../fixtures/trainers/fsdp"
FAULTS = "../fixtures/mutants/ranks"

sharded = "shards of the same sum: Zhao et al., PyTorch FSDP, arXiv 2304.11277, section 3"
local = "the norm of a shard is smaller than the norm of the whole: pytorch/pytorch#72548"


def row(
    name: str, *expect: Theory, folder: str = LOOPS, file: str | None = None, **more: Any
) -> Workload:
    """Return a row whose point is a loop of the fixtures."""
    path = f"{folder}/{file or name}.py"
    stated: dict[str, Any] = {
        "accumulation_steps": (2, 4),
        "world_sizes": (2, 4),
        "strategies": ("fsdp",),
    }
    return Workload(
        name,
        expect,
        build=part(f"{path}:build"),
        batches=part(f"{path}:batches"),
        train=part(f"{path}:train"),
        **(stated | more),
    )


def fault(name: str, code: str, source: str) -> Workload:
    """Return a row with a fault of the fixtures."""
    return row(name, divergent(code, source=source), folder=FAULTS, file=f"{code.lower()}_{name}")


WORKLOADS = [
    row("fsdp2", equivalent(sharded), claims=("C22", "C23")),
    row("fsdp2_sync_every", equivalent(sharded), claims=("C22", "C23")),
    row(
        "fsdp2_no_reshard", equivalent("when parameters are gathered: " + sharded), claims=("C22",)
    ),
    row("fsdp2_mixed", equivalent("casts of one sample do not see the others"), claims=("C22",)),
    row("fsdp2_clipped", equivalent("one clip, by the norm of the whole"), claims=("C10",)),
    row("fsdp2_clip_full_norm", equivalent("one clip, by the norm of the whole"), claims=("C10",)),
    row("hsdp", equivalent(sharded), world_sizes=(4,)),
    row("fsdp1", equivalent(sharded), claims=("C22", "C23")),
    row("fsdp1_sync_every", equivalent(sharded), claims=("C22", "C23")),
    row("fsdp1_original_parameters", equivalent(sharded), claims=("C22",)),
    row("fsdp1_original_sync_every", equivalent(sharded), claims=("C22",)),
    row("fsdp1_grad_op", equivalent(sharded), claims=("C22",)),
    row("fsdp1_clipped", equivalent("one clip, by the norm of the whole"), claims=("C10",)),
    fault("fsdp2_token_mean", "EQ501", "a mean of ranks: 1/R against n_r/N"),
    fault("fsdp2_never_reduced", "EQ502", "no shard receives a gradient"),
    fault("fsdp2_global_count_averaged", "EQ504", "1/N, averaged: 1/(R N)"),
    fault("fsdp2_local_norm", "EQ506", local),
    fault("fsdp2_clip_on_one_rank", "EQ506", local),
    fault("fsdp1_torch_clip", "EQ506", local),
]
