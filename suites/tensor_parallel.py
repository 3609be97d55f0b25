"""Tensor parallelism: layers are cut, every rank sees all samples, and accumulation is as on one."""

from __future__ import annotations

from typing import Any

from equivcheck.suite import Workload, equivalent, part

LOOPS = "../fixtures/trainers/tensor_parallel"

cut = "a product of matrices, cut by columns and rows: Shoeybi et al., arXiv 1909.08053, section 3"


def row(name: str, **more: Any) -> Workload:
    """Return a row whose point is a loop of the fixtures."""
    path = f"{LOOPS}/{name}.py"
    return Workload(
        name,
        equivalent(cut),
        build=part(f"{path}:build"),
        batches=part(f"{path}:batches"),
        train=part(f"{path}:train"),
        accumulation_steps=(2, 4),
        strategies=("tensor_parallel",),
        **more,
    )


WORKLOADS = [
    row("columns_and_rows", world_sizes=(2, 4), claims=("C1",)),
    row("with_fsdp2", world_sizes=(4,), claims=("C1", "C22")),
]
