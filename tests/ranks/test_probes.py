"""What interventions learn on ranks comes back: addends of the loss, running statistics; and DDP that raises late."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

import equivcheck

LOOP = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        {layers}

    def forward(self, x):
        {forward}

def build():
    return Net()

def batches():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 6, generator=g), torch.randn(16, 3, generator=g)) for _ in range(2)]

def train(model, loader, accumulation_steps, world_size):
    bare = model
    if world_size > 1:
        model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader):
        last = (i + 1) % accumulation_steps == 0
        if world_size > 1:
            model.require_backward_grad_sync = last
        out, hidden = model(x)
        main = (out - y).square().mean()
        {loss}
        loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
"""

PLAIN = "hidden = self.first(x).tanh(); return self.second(hidden), hidden"
DIVIDED = "loss = main / accumulation_steps"


def case_of(folder, loss=DIVIDED, layers="pass", forward=PLAIN, accumulation_steps=2):
    path = Path(folder) / "subject.py"
    text = textwrap.dedent(LOOP).format(loss=loss, layers=layers, forward=forward)
    path.write_text(text, encoding="utf-8")
    found = equivcheck.measure(
        str(path), accumulation_steps=accumulation_steps, world_size=2, strategy="ddp"
    )
    return found.cases[0]


def codes(case):
    return [(each["code"], each["status"]) for each in case["causes"]]


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_an_auxiliary_loss_that_is_not_divided(tmp_path, accumulation_steps):
    """EQ106: every rank's addends are seen, and one of them is wrong."""
    loss = "loss = main / accumulation_steps + 0.1 * hidden.square().mean()"

    case = case_of(tmp_path, loss, accumulation_steps=accumulation_steps)

    assert codes(case) == [("EQ106", "proved")], case["headline"]
    assert case["causes"][0]["evidence"]["times"] == pytest.approx(accumulation_steps, rel=0.2)


def test_a_penalty_in_every_micro_batch(tmp_path):
    """EQ107: its gradient is the same in every micro-batch of every rank."""
    penalty = "sum(p.square().sum() for p in bare.parameters())"

    case = case_of(tmp_path, f"loss = main / accumulation_steps + 0.01 * {penalty}")

    assert codes(case) == [("EQ107", "proved")], case["headline"]
    assert case["causes"][0]["evidence"]["times"] == pytest.approx(2.0)
    assert case["causes"][0]["evidence"]["same_in_every_micro_batch"] is True


def test_an_auxiliary_loss_that_is_divided(tmp_path):
    """The same two addends, both divided, are no fault."""
    case = case_of(tmp_path, "loss = (main + 0.1 * hidden.square().mean()) / accumulation_steps")

    assert case["verdict"] == "equivalent", case["headline"]


def test_batch_statistics_of_each_rank(tmp_path):
    """EQ201 alone: the running statistics are what each rank's own micro-batches give."""
    forward = "hidden = self.norm(self.first(x)).tanh(); return self.second(hidden), hidden"

    case = case_of(tmp_path, layers="self.norm = nn.BatchNorm1d(8)", forward=forward)

    assert codes(case) == [("EQ201", "proved")], case["headline"]


def test_running_statistics_alone(tmp_path):
    """EQ203: the statistics are kept beside the model, which does not use them."""
    forward = (
        "hidden = self.first(x).tanh(); self.norm(hidden.detach()); "
        "return self.second(hidden), hidden"
    )

    case = case_of(tmp_path, layers="self.norm = nn.BatchNorm1d(8, affine=False)", forward=forward)

    assert codes(case) == [("EQ203", "proved")], case["headline"]


ALONE = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.branch, self.second = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, y):
        hidden = self.first(x)
        flagged = y[:, :1] > 5
        if flagged.any():
            hidden = hidden + flagged * self.branch(x)
        return self.second(hidden.tanh())

def build():
    return Net()

def batches():
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(3):
        x, y = torch.randn(16, 6, generator=g), torch.randn(16, 3, generator=g)
        y[0, 0] = 9.0  # the first micro-batch of rank 0
        found.append((x, y))
    return found

def train(model, loader, accumulation_steps, world_size):
    if world_size > 1:
        model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for i, (x, y) in enumerate(loader):
        last = (i + 1) % accumulation_steps == 0
        if world_size > 1:
            model.require_backward_grad_sync = last
        ((model(x, y) - y).square().mean() / accumulation_steps).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
"""


def test_a_parameter_that_ddp_misses_in_the_first_of_several_steps(tmp_path):
    """EQ508: DDP raises at the next forward; the step before, which it never reduced, is what is wrong."""
    path = tmp_path / "subject.py"
    path.write_text(ALONE, encoding="utf-8")

    [case] = equivcheck.measure(
        str(path), accumulation_steps=2, world_size=2, strategy="ddp", timeout=60
    ).cases

    assert "EQ508" in [code for code, _ in codes(case)], case["headline"]
    assert case["verdict"] == "divergent"
    assert any("judged before optimizer_step 1" in note for note in case["notes"])


WEIGHTED = """
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def batches():
    g = torch.Generator().manual_seed(0)
    counts = [1, 2, 1, 3, 5, 4, 7, 6, 2, 9, 8, 1, 4, 4, 3, 11]
    mask = torch.tensor([[t < n for t in range(12)] for n in counts])
    return [(torch.randn(16, 12, 6, generator=g), torch.randn(16, 12, 3, generator=g), mask)] * 2

def train(model, loader, accumulation_steps, world_size):
    if world_size > 1:
        model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y, mask) in enumerate(loader):
        last = (i + 1) % accumulation_steps == 0
        if world_size > 1:
            model.require_backward_grad_sync = last
        loss = (model(x) - y).square().mean(-1)[mask].mean()
        (loss / accumulation_steps).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
"""


def test_the_mean_of_ranks_of_means_of_micro_batches(tmp_path):
    """Two faults, EQ103 and EQ501: each alone leaves the gradient wrong, both together bring it back."""
    path = tmp_path / "subject.py"
    path.write_text(WEIGHTED, encoding="utf-8")

    [case] = equivcheck.measure(str(path), accumulation_steps=2, world_size=2, strategy="ddp").cases

    assert sorted(codes(case)) == [("EQ103", "proved"), ("EQ501", "proved")], case["headline"]
