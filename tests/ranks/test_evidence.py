"""What a cause of several ranks says: which parameters, which cycles, which rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.ranks import crew
from equivcheck.subject import load_subject

MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants" / "ranks"


@pytest.mark.parametrize(
    ("name", "told", "fix"),
    [
        ("eq502_one_parameter_ignored", {"parameters": "1 of 10"}, "reduce the gradients of all"),
        (
            "eq502_incomplete_cycle_not_reduced",
            {"cycles": "incomplete ones only"},
            "leave no_sync() where the step is taken",
        ),
        ("eq502_no_sync_to_the_end", {}, "leave no_sync() before the last"),
        (
            "eq502_parameters_averaged_after_adam",
            {},
            "reduce the gradients before optimizer.step()",
        ),
        ("eq109_reduced_again", {}, "reduce once, after the last backward"),
        ("eq508_reduced_where_all_have_it", {}, "DistributedDataParallel(model, find_unused"),
        (
            "eq305_skipped_on_one_rank",
            {"lost_micro_steps": ["0 of rank 1"]},
            "run backward for every micro-batch",
        ),
    ],
)
def test_a_cause_tells_where_it_is(name: str, told: dict[str, object], fix: str) -> None:
    """The place is in the evidence, and the fix is that of this place."""
    path = str(MUTANTS / f"{name}.py")
    case = Case(path, 2, world_size=2, strategy="ddp")

    [cause] = run_case(load_subject(path), case)["causes"]

    evidence = cause["evidence"]
    assert {key: evidence.get(key) for key in told} == told
    assert ("cycles" in evidence) == ("cycles" in told)
    assert cause["fix"].startswith(fix)


def test_parameters_averaged_after_the_step_are_judged_there() -> None:
    """What ranks do each for themselves is not shown as the difference; a note says what was compared."""
    path = str(MUTANTS.parents[1] / "trainers" / "ddp" / "parameters_averaged.py")

    result = run_case(load_subject(path), Case(path, 2, world_size=2, strategy="ddp"))

    assert result["headline"].startswith("the same update: parameters agree to ")
    assert result["divergence"]["gradients"] is None
    assert 0.0 < result["divergence"]["parameters"]["relative"] < 1e-12
    assert result["margin"] > 1.0
    assert [each["verdict"] for each in result["ranks"]] == ["equivalent"] * 2
    assert any("where the loop leaves them" in note for note in result["notes"])


SAMPLED = """
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, RandomSampler

def build():
    return nn.Linear(4, 1)

def batches():
    g = torch.Generator().manual_seed(0)
    return [
        {{"x": torch.randn(16, 4, generator=g), "y": torch.randn(16, 1, generator=g)}}
        for _ in range(2)
    ]

def train(model, dataset, micro_batch_size, accumulation_steps, optimizer_steps, rank, world_size):
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset, micro_batch_size, sampler={sampler})
    for i, batch in enumerate(loader):
        (mse_loss(model(batch["x"]), batch["y"]) / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
        if i + 1 == accumulation_steps * optimizer_steps:
            break
"""


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    "sampler",
    ["None", "RandomSampler(dataset, generator=torch.Generator().manual_seed(rank))"],
    ids=["none", "seeded by the rank"],
)
def test_ranks_that_take_the_same_samples(tmp_path: Path, sampler: str, world_size: int) -> None:
    """Nothing can be compared: EQ601, with the sampler that is missing, and not what it looks like."""
    path = tmp_path / "subject.py"
    path.write_text(SAMPLED.format(sampler=sampler), encoding="utf-8")

    result = run_case(load_subject(str(path)), Case(str(path), 2, world_size=world_size))

    assert result["verdict"] == "invalid", result["headline"]
    [cause] = result["causes"]
    assert (cause["code"], cause["status"]) == ("EQ601", "proved")
    taken, total = cause["evidence"]["samples_of_several_ranks"].split(" of ")
    assert 0 < int(taken) <= int(total) <= 16
    assert cause["fix"].startswith("DistributedSampler(")


JOINED = """
import torch
import torch.distributed as dist
from contextlib import nullcontext
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

def build():
    return nn.Linear(4, 1)

def batches():
    g = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(16, 4, generator=g), "y": torch.randn(16, 1, generator=g)}
        for _ in range(2)
    ]

def train(model, loader, accumulation_steps, rank, world_size):
    if world_size > 1:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cycle = []
    for batch in loader:
        cycle.append(batch)
        if len(cycle) < accumulation_steps:
            continue
        total = 16
        if rank:
            cycle = [{key: torch.cat([each[key] for each in cycle]) for key in batch}]
        with Join([model]) if world_size > 1 else nullcontext():
            for each in cycle:
                loss = mse_loss(model(each["x"]), each["y"], reduction="sum")
                (loss * world_size / total).backward()
        optimizer.step()
        optimizer.zero_grad()
        cycle = []
"""


@pytest.mark.slow
def test_a_loop_that_waits_for_ever_with_something_put_right_keeps_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has joined sends zeros, others what they have accumulated; what is put right lets them hang."""
    monkeypatch.setattr(crew, "STALLED", 3600.0)
    path = tmp_path / "subject.py"
    path.write_text(JOINED, encoding="utf-8")
    case = Case(str(path), 2, world_size=2, strategy="ddp")

    result = run_case(load_subject(str(path)), case, timeout=300.0)

    assert result["verdict"] == "divergent", result["headline"]


NO_GUARD = """
import torch
import torch.distributed as dist

def build():
    return torch.nn.Linear(4, 1)

def batches():
    return [torch.ones(8, 4)]

def train(model, loader, accumulation_steps):
    dist.get_world_size()
"""


def test_a_loop_that_asks_for_its_ranks_where_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "subject.py"
    path.write_text(NO_GUARD, encoding="utf-8")

    result = run_case(load_subject(str(path)), Case(str(path), 2, world_size=2))

    assert result["verdict"] == "error"
    assert result["error"]["because"].endswith("one process, which has no process group")
    assert result["error"]["fix"].startswith("if world_size > 1:")
