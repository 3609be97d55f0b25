"""Pipelines: the micro-batches that fill one are accumulation, and the schedule divides the gradients.

torch.distributed.pipelining divides them by the number of micro-batches unless it is told not to, so
that a mean loss is the full batch's where all micro-batches count the same.
"""

from __future__ import annotations

from typing import Any

from equivcheck.suite import Theory, Workload, divergent, equivalent, part

LOOPS = "../fixtures/trainers/pipeline"
FAULTS = "../fixtures/mutants/ranks"

gpipe = "gradients of micro-batches are added: Huang et al., GPipe, arXiv 1811.06965, section 2.2"
order = "another order of the same sums: Narayanan et al., arXiv 2104.04473, section 2.2"
scaled = "scale_grads=True is the default: torch.distributed.pipelining, schedules"


def row(
    name: str, *expect: Theory, folder: str = LOOPS, file: str | None = None, **more: Any
) -> Workload:
    """Return a row whose point is a loop of the fixtures; stages exchange buffers of one size."""
    path = f"{folder}/{file or name}.py"
    stated: dict[str, Any] = {
        "accumulation_steps": (2, 4),
        "world_sizes": (2, 4),
        "splits": ("even",),
        "strategies": ("pipeline",),
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
    file = f"{code.lower()}_pipeline_{name}"
    return row(name, divergent(code, source=source), folder=FAULTS, file=file)


WORKLOADS = [
    row("gpipe", equivalent(gpipe), claims=("C1", "C2")),
    row("token_weighted", equivalent("a sum by the count of all micro-batches"), claims=("C14",)),
    # At least one micro-batch per stage, and as many as ranks or a multiple of them.
    row("one_forward_one_backward", equivalent(order), accumulation_steps=(4,)),
    row("interleaved", equivalent(order), accumulation_steps=(4,)),
    fault("loss_divided", "EQ102", "divided by the loss and by the schedule: " + scaled),
    fault("not_scaled", "EQ101", "divided by nobody: " + scaled),
    fault("stage_norm", "EQ506", "a stage's norm is smaller: pytorch/torchtitan#649"),
]
