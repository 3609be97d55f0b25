"""ZeRO stage 1: every rank holds all gradients and steps its share of the parameters."""

from __future__ import annotations

from typing import Any

from equivcheck.suite import Theory, Workload, divergent, equivalent, part

LOOPS = "../fixtures/trainers/zero"
FAULTS = "../fixtures/mutants/ranks"

shares = "who steps a parameter does not matter: Rajbhandari et al., ZeRO, arXiv 1910.02054, 5.1"


def row(
    name: str, *expect: Theory, folder: str = LOOPS, file: str | None = None, **more: Any
) -> Workload:
    """Return a row whose point is a loop of the fixtures."""
    path = f"{folder}/{file or name}.py"
    return Workload(
        name,
        expect,
        build=part(f"{path}:build"),
        batches=part(f"{path}:batches"),
        train=part(f"{path}:train"),
        accumulation_steps=(2, 4),
        world_sizes=(2, 4),
        strategies=("zero",),
        **more,
    )


WORKLOADS = [
    row("adamw", equivalent(shares), claims=("C21",)),
    row("bucket_view", equivalent(shares), claims=("C21",)),
    row("clipped_sgd", equivalent("one clip, by the norm of the whole"), claims=("C10", "C21")),
    row("sharded_by_hand", equivalent(shares), claims=("C21",)),
    row(
        "share_norm",
        divergent("EQ506", source="a share's norm is smaller: deepspeedai/DeepSpeed#7302"),
        folder=FAULTS,
        file="eq506_zero_share_norm",
        claims=("C10",),
    ),
]
