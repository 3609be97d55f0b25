"""A pipeline of two stages a rank under the schedule of torch that the variable SCHEDULE names."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed import pipelining

sys.path.insert(0, str(Path(__file__).parents[2]))

from fixtures.batches import digits
from fixtures.models.stack import Stack
from fixtures.trainers._ranks import Batch, Loader, cycles

NAME = os.environ.get("SCHEDULE", "ScheduleInterleaved1F1B")
SINGLE = ("ScheduleGPipe", "Schedule1F1B")  # one stage a rank
FOLDED = ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")  # rank r holds stages r and 2 R - 1 - r


def build() -> nn.Module:
    """Return eight residual blocks between a stem and a head."""
    return Stack()


def batches() -> list[Batch]:
    """Return three full batches of 32 digits."""
    return digits.classification(number=3, rows=32)


def places_of(rank: int, world_size: int) -> tuple[int, ...]:
    """Return the stages that a rank holds."""
    if NAME in SINGLE:
        return (rank,)
    return (rank, 2 * world_size - 1 - rank if NAME in FOLDED else rank + world_size)


def train(
    model: nn.Module,
    loader: Loader,
    accumulation_steps: int,
    rank: int,
    world_size: int,
    device: torch.device,
) -> None:
    """Train by SGD; the micro-batches of a cycle go through the pipeline together."""
    parts, schedule = [model], None
    if world_size > 1:
        places = places_of(rank, world_size)
        count = len(places) * world_size
        parts = [model.stage(place, count) for place in places]
        stages = [
            pipelining.PipelineStage(part, place, count, device)
            for part, place in zip(parts, places, strict=True)
        ]
        made = getattr(pipelining, NAME, None) or getattr(pipelining.schedules, NAME)
        schedule = made(
            stages[0] if NAME in SINGLE else stages,
            accumulation_steps,
            loss_fn=nn.functional.cross_entropy,
        )
    parameters = [p for part in parts for p in part.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for cycle in cycles(loader, accumulation_steps):
        if schedule is None:
            for batch in cycle:
                loss = nn.functional.cross_entropy(model(batch["x"]), batch["y"])
                (loss / accumulation_steps).backward()
        else:
            x, y = (torch.cat([batch[name] for batch in cycle]) for name in ("x", "y"))
            schedule.step(*([x] if rank == 0 else []), target=y)
        optimizer.step()
        optimizer.zero_grad()
