"""How ranks are started, watched, compared part by part, and put together."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

import equivcheck
from equivcheck.differences import Sums
from equivcheck.parts import Holdings
from equivcheck.ranks import wire
from equivcheck.ranks.crew import _named
from equivcheck.ranks.merge import merged
from equivcheck.ranks.status import RUNNING, Board, Standing
from equivcheck.recording import Recording, Step

LOOP = """
import os, signal, time
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

def build():
    return nn.Linear(4, 2)

def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=g) for _ in range(2)]

def train(model, loader, accumulation_steps, rank, world_size):
    if world_size > 1:
        dist.init_process_group("gloo")
        model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        if world_size > 1 and rank == 1 and i == 2:
            {fault}
        (model(x).square().mean() / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    if world_size > 1:
        dist.destroy_process_group()
"""


def case_of(folder, fault, **named):
    path = Path(folder) / "subject.py"
    path.write_text(textwrap.dedent(LOOP).format(fault=fault), encoding="utf-8")
    found = equivcheck.measure(
        str(path), accumulation_steps=2, world_size=2, strategy="ddp", **named
    )
    return found.cases[0]


def test_a_correct_loop_on_two_ranks_is_equivalent(tmp_path):
    """Every rank is compared, and what it sent is told."""
    case = case_of(tmp_path, "pass")

    assert case["verdict"] == "equivalent", case
    assert [each["rank"] for each in case["ranks"]] == [0, 1]
    assert all(each["verdict"] == "equivalent" for each in case["ranks"])
    assert case["warnings"][0]["code"] == "EQ503"  # it reduces in every micro-batch
    evidence = case["warnings"][0]["evidence"]
    assert (evidence["count"], evidence["minimum_count"], evidence["proved"]) == (2, 1, True)


@pytest.mark.parametrize(
    ("fault", "told", "because"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed by signal 9", "lack of memory"),
        ("raise ValueError('bad row')", "train-raised: ValueError: bad row", "rank 0 stopped"),
        ("raise MemoryError", "train-raised: MemoryError", "rank 0 stopped because rank 1 failed"),
        ("os._exit(7)", "rank 1 ended with exit code 7", "rank 0 stopped"),
    ],
    ids=["killed", "raises", "memory", "exits"],
)
def test_a_rank_that_fails_is_named_with_its_step(tmp_path, fault, told, because):
    """The case is an error, and no rank is left."""
    case = case_of(tmp_path, fault, timeout=100)

    assert case["verdict"] == "error"
    assert told in case["error"]["message"]
    assert "rank 1, optimizer_step 1" in case["error"]["where"]
    assert because in case["error"]["because"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["time.sleep(1000)", "continue"], ids=["hangs", "skips"])
def test_a_rank_that_others_wait_for_is_named_in_time(tmp_path, fault):
    """Ranks that wait for each other end with the time that was allowed."""
    case = case_of(tmp_path, fault, timeout=60)

    assert case["verdict"] == "error"
    assert "rank" in case["error"]["message"]
    assert case["seconds"] < 65


def test_messages_keep_what_is_one_and_the_same_tensor(tmp_path):
    """Large tensors lie in the file, once; small ones in the message."""
    small, large = torch.arange(3.0), torch.randn(5000, dtype=torch.float64)
    arena = wire.Arena(tmp_path / "arena")
    message = arena.dumps({"a": small, "b": small, "c": large, "d": [large]})
    again = arena.dumps(large)
    arena.close()
    found = wire.loads(message, wire.Mapped(tmp_path / "arena"))

    assert found["a"] is found["b"]
    assert found["c"] is found["d"][0]
    assert torch.equal(found["c"], large)
    assert len(message) < 4000
    assert (tmp_path / "arena").stat().st_size == large.nbytes
    assert torch.equal(wire.loads(again, wire.Mapped(tmp_path / "arena")), large)


def test_a_closure_travels_by_value():
    """A function that no module has."""
    factor = 3

    assert wire.loads(wire.dumps(lambda x: factor * x))(2) == 6


def test_the_board_says_where_a_rank_stands(tmp_path):
    """Another mapping of the same file sees it."""
    Board(tmp_path / "board", 2).write(1, Standing(3, 1, 7, 20, 2, RUNNING))

    assert Board(tmp_path / "board").read(1) == Standing(3, 1, 7, 20, 2, RUNNING)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [([1], "rank 1"), ([1, 2, 3], "ranks 1-3"), ([0, 2, 3], "ranks 0 and 2-3")],
)
def test_ranks_are_named_in_spans(ranks, named):
    assert _named(ranks) == named


def step(samples, sums, parts=None, matched=0):
    return Step(
        0,
        "SGD",
        frozenset(samples),
        1,
        0,
        [0.1],
        matched=matched,
        gradients={"w": sums},
        sample={"w": torch.zeros(1)},
        parts=parts or {},
    )


def together(*steps):
    reference = Recording("reference", [step({(0, 0), (0, 1)}, Sums(1.0))])
    return merged([Recording("candidate", [each]) for each in steps], reference).steps[0]


def test_replicas_count_by_the_one_that_is_furthest_off():
    """Two ranks hold the same tensor whole."""
    found = together(step({(0, 0)}, Sums(4.0, dd=1.0)), step({(0, 1)}, Sums(4.0, dd=2.0)))

    assert (found.gradients["w"].rr, found.gradients["w"].dd) == (4.0, 2.0)
    assert found.matched == 0


def test_parts_of_a_tensor_add_up():
    """Two ranks hold a half each."""
    found = together(
        step({(0, 0)}, Sums(4.0, dd=1.0), {"w": 0}), step({(0, 1)}, Sums(5.0, dd=2.0), {"w": 1})
    )

    assert (found.gradients["w"].rr, found.gradients["w"].dd) == (9.0, 3.0)


def test_ranks_that_consumed_other_samples_together_match_nothing():
    """One sample was seen twice, the other never."""
    found = together(step({(0, 0)}, Sums(1.0)), step({(0, 0)}, Sums(1.0)))

    assert found.matched is None


def test_a_plain_parameter_is_held_whole():
    """Without sharding a part is the tensor itself."""
    model = torch.nn.Linear(3, 2)
    [part] = Holdings(model).parts(model.weight, "weight")

    assert part.is_whole
    assert part.local(model.weight) is model.weight
