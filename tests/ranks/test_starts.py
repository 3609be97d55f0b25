"""Workers that hold a DistributedDataParallel are started and ended again and again, and none of them hangs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment

# As often as it is claimed; torch 2.13 hangs in a third of the runs that destroy the group before the wrapper.
STARTS = int(os.environ.get("STARTS", "200"))

LOOP = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

def build():
    return nn.Linear(4, 2)

def batches():
    return [torch.ones(8, 4)]

def train(model, loader, accumulation_steps, world_size):
    if world_size > 1:
        dist.init_process_group("gloo")
        model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        (model(x).square().mean() / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    if world_size > 1:
        dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_starts_and_ends(tmp_path: Path) -> None:
    """Each time two new processes join, train, destroy their group and end, long before a limit that a hang passes."""
    path = tmp_path / "loop.py"
    path.write_text(LOOP, encoding="utf-8")
    experiment = SubjectExperiment(load_subject(str(path)), Case(str(path), 2, world_size=2))
    experiment.reference()
    assert experiment.crew is not None
    seconds = []

    for _ in range(STARTS):
        began = time.monotonic()
        experiment.limit(60.0)
        recording = experiment.candidate_again()
        experiment.crew.close()
        seconds.append(time.monotonic() - began)

        assert len(recording.ranks) == 2
    experiment.close()

    print(
        f"{STARTS} starts and ends: median {sorted(seconds)[STARTS // 2]:.2f} s, longest {max(seconds):.2f} s"
    )
