"""How ranks are started, watched, compared part by part, and put together."""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard

import equivcheck
from equivcheck.differences import Sums
from equivcheck.errors import UsageError
from equivcheck.parts import Holdings, Part, _window, itself, positions
from equivcheck.ranks import group, team, wire
from equivcheck.ranks.crew import _named
from equivcheck.ranks.merge import merged
from equivcheck.ranks.status import RUNNING, Board, Standing
from equivcheck.recording import Kept, Recording, Step
from equivcheck.shelf import Shelf

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


FLAT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

def build():
    return nn.Linear(4, 2)

def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=g) for _ in range(2)]

def train(model, loader, accumulation_steps, rank, world_size):
    flat = parameters_to_vector(model.parameters()).detach()
    mine = nn.Parameter(flat.chunk(world_size)[rank].clone())
    optimizer = torch.optim.SGD([mine], lr=0.1)
    for i, x in enumerate(loader):
        (model(x).square().mean() / accumulation_steps / world_size).backward()
        if (i + 1) % accumulation_steps == 0:
            gradient = parameters_to_vector([p.grad for p in model.parameters()])
            if world_size > 1:
                dist.all_reduce(gradient)
            mine.grad = gradient.chunk(world_size)[rank].clone()
            optimizer.step()
            parts = [torch.empty_like(mine) for _ in range(world_size)]
            if world_size > 1:
                dist.all_gather(parts, mine.detach())
            else:
                parts = [mine.detach()]
            vector_to_parameters(torch.cat(parts), model.parameters())
            model.zero_grad()
"""

FACTOR = """
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

def build():
    return nn.Linear(4, 2)

def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=g) for _ in range(2)]

def train(model, loader, accumulation_steps, world_size):
    if world_size > 1:
        fully_shard(model)
        model.set_gradient_divide_factor({divided_by})
        model.set_force_sum_reduction_for_comms({forced})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        if world_size > 1:
            model.set_requires_gradient_sync((i + 1) % accumulation_steps == 0)
        (model(x).square().mean() / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""

LEFT_WHOLE = """
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

def build():
    return nn.Linear(4, 2)

def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=g) for _ in range(2)]

def train(model, loader, accumulation_steps, world_size, device):
    if world_size > 1:
        model = FullyShardedDataParallel(model, device_id=device, use_orig_params=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        loss = model(x).square().mean() / accumulation_steps
        if world_size > 1:
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


def case_of_text(folder, text, strategy):
    path = Path(folder) / "subject.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    found = equivcheck.measure(str(path), accumulation_steps=2, world_size=2, strategy=strategy)
    return found.cases[0]


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


def ranks_left():
    """Return the ids of processes that the fork server has started and that have not ended."""
    server = forkserver._forkserver._forkserver_pid
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            with suppress(OSError):
                fields = (each / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[1]) == server:
                    found.append(int(each.name))
    return found


@pytest.mark.parametrize(
    ("fault", "told", "because"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed by signal 9", "lack of memory"),
        ("raise ValueError('bad row')", "train-raised: ValueError: bad row", "rank 0 stopped"),
        ("torch.empty(2**55)", "DefaultCPUAllocator", "rank 0 stopped because rank 1 failed"),
        ("os._exit(7)", "rank 1 ended with exit code 7", "os._exit() does; rank 0 stopped"),
    ],
    ids=["killed", "raises", "memory", "exits"],
)
def test_a_rank_that_fails_is_named_with_its_step(tmp_path, fault, told, because):
    """The case is an error, and no process is left."""
    case = case_of(tmp_path, fault, timeout=100)

    assert case["verdict"] == "error"
    assert told in case["error"]["message"]
    assert "rank 1, optimizer_step 1" in case["error"]["where"]
    assert because in case["error"]["because"]
    assert ranks_left() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("time.sleep(1000)", "rank 1 is behind"),
        ("dist.all_reduce(torch.ones(1)); dist.all_reduce(torch.ones(1))", "rank"),
        ("continue", "rank 1"),
    ],
    ids=["hangs", "in-a-collective", "other-micro-batches"],
)
def test_a_rank_that_others_wait_for_is_named_in_time(tmp_path, fault, told):
    """Ranks that wait for each other end with the time that was allowed; who is behind is said, and where."""
    case = case_of(tmp_path, fault, timeout=30)

    assert case["verdict"] == "error"
    assert told in case["error"]["message"], case["error"]
    assert "optimizer_step" in case["error"]["where"]
    assert case["seconds"] < 33
    assert ranks_left() == []


def test_finished_cases_outlive_a_rank_that_fails(tmp_path):
    """The case before and the case after are decided: others take the place of ranks that have ended."""
    path = tmp_path / "subject.py"
    fault = "if accumulation_steps == 2: os.kill(os.getpid(), signal.SIGKILL)"
    path.write_text(textwrap.dedent(LOOP).format(fault=fault), encoding="utf-8")

    found = equivcheck.measure(
        str(path), accumulation_steps=[1, 2, 4], world_size=2, strategy="ddp"
    )

    assert [case["verdict"] for case in found.cases] == ["equivalent", "error", "equivalent"]
    assert ranks_left() == []


def test_parts_of_a_framework_s_own_are_refused(tmp_path):
    """Of which part of the full batch's tensor a rank steps nothing is known: no verdict, and no fault of ours."""
    case = case_of_text(tmp_path, FLAT, "zero")

    assert case["verdict"] == "error"
    assert case["headline"].startswith("unknown-parts: ")
    assert case["headline"].endswith(" is (5,), not (10,)")
    assert case["error"]["exit_code"] == 3
    assert "candidate, rank 0, optimizer_step 0" in case["error"]["where"]


@pytest.mark.parametrize(
    ("divided_by", "forced", "codes"),
    [("float(world_size)", True, []), ("1.0", True, ["EQ504"]), ("1.0", False, None)],
    ids=["divided", "not divided", "not on gloo"],
)
def test_a_divide_factor_of_fsdp2(tmp_path, divided_by, forced, codes):
    """It is judged where the reduction is a sum; gloo cannot multiply in one, which is told with the way out."""
    case = case_of_text(tmp_path, FACTOR.format(divided_by=divided_by, forced=forced), "fsdp")

    if codes is None:
        assert case["verdict"] == "error"
        assert "set_force_sum_reduction_for_comms" in case["error"]["fix"]
    else:
        assert case["verdict"] == ("divergent" if codes else "equivalent")
        assert codes == [each["code"] for each in case["causes"] if each["status"] == "proved"]


def test_gradients_that_fsdp1_never_reduced_are_told(tmp_path):
    """They are whole where parameters are shards: the step itself raises, for a reason that torch does not name."""
    case = case_of_text(tmp_path, LEFT_WHOLE, "fsdp")

    assert case["verdict"] == "error"
    assert "no_sync" in case["error"]["because"]


def test_ranks_are_kept_from_one_case_to_the_next(tmp_path):
    """The same processes serve case after case inside the block, and none is left after it."""
    path = tmp_path / "subject.py"
    path.write_text(textwrap.dedent(LOOP).format(fault="pass"), encoding="utf-8")
    named = {"accumulation_steps": 2, "world_size": 2, "strategy": "ddp"}

    with team.kept():
        first = equivcheck.measure(str(path), **named), ranks_left()
        second = equivcheck.measure(str(path), **named), ranks_left()
    left = ranks_left()

    assert [found.verdict for found, _ in (first, second)] == ["equivalent", "equivalent"]
    assert len(first[1]) == 2
    assert sorted(first[1]) == sorted(second[1])
    assert left == []


@pytest.mark.parametrize(
    ("traffic", "sound"),
    [
        ([(4, 1), (4, 1)], True),
        ([(4, 1), (5, 1)], False),
        ([(4, 99), (4, 99)], False),
        ([(5000, 1), (5000, 1)], False),
    ],
    ids=["alike", "one-more", "groups", "long-record"],
)
def test_ranks_that_are_out_of_step_are_not_kept(traffic, sound):
    """A collective that only one rank has issued, groups upon groups, or a long record reach into the next case."""
    found = object.__new__(team.Team)
    found.ranks = [team.Rank(None, traffic=each) for each in traffic]

    assert found.is_sound is sound


def test_sampled_coordinates_are_found_in_every_kind_of_part():
    """Windows are found by arithmetic, with nothing as large as the parameter; other parts by marking all of it."""
    shapes = [(7, 5), (16, 3), (12,), (4, 6, 5), (1, 9)]
    by_arithmetic = 0
    for shape, ranks in itertools.product(shapes, (2, 4)):
        size = math.prod(shape)
        chosen = torch.randperm(size)[:6].sort().values
        for dim, rank in itertools.product(range(len(shape)), range(ranks)):
            cuts = [shard(dim, rank, ranks), shard(dim, rank, ranks, then=(dim + 1) % len(shape))]
            for cut in [*cuts, lambda whole: whole.flatten()[3:8], lambda whole: whole.flip(0)]:
                part = Part("w", torch.zeros(1), itself, cut, ("part",))
                sampled, mine, count = positions(part, chosen, shape)
                whole = torch.arange(size).view(shape)

                assert count == len(chosen)
                assert torch.equal(cut(whole).flatten()[mine], chosen[sampled])
                assert set(sampled.tolist()) == {
                    i for i, c in enumerate(chosen.tolist()) if bool((cut(whole) == c).any())
                }
                by_arithmetic += _window(part, shape) is not None
    assert by_arithmetic > 50


def shard(dim, rank, ranks, then=None):
    """Return what cuts a rank's shard out, and of that a half along another dimension."""

    def cut(whole):
        pieces, _ = Shard(dim)._split_tensor(whole, ranks, with_padding=False, contiguous=False)
        found = pieces[rank]
        if then is not None:
            halves, _ = Shard(then)._split_tensor(found, 2, with_padding=False, contiguous=False)
            found = halves[0]
        return found

    return cut


@pytest.mark.parametrize(
    ("device", "gpus", "ranks", "expected"),
    [
        ("cpu", 2, 2, "gloo"),
        ("cuda", 2, 2, "cpu:gloo,cuda:nccl"),
        ("cuda", 1, 2, "gloo"),
    ],
    ids=["cpu", "a-gpu-each", "one-gpu-for-two"],
)
def test_the_backend_is_chosen_by_what_is_there(monkeypatch, device, gpus, ranks, expected):
    """Nccl refuses two ranks on one GPU, gloo does not."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    assert group.backend_of(device) == expected


def test_collectives_of_gloo_and_of_nccl_are_put_in_order(monkeypatch):
    """Each has a flight recorder of its own; what came before the run is left out."""

    def dump(*times, backend):
        return json.dumps(
            {
                "entries": [
                    {
                        "time_created_ns": at,
                        "profiling_name": f"{backend}:all_reduce",
                        "input_sizes": [[3, 2]],
                        "input_dtypes": ["Double"],
                        "process_group": ["0", "default_pg"],
                    }
                    for at in times
                ]
            }
        )

    module = torch._C._distributed_c10d
    gloo, nccl = dump(1, 5, backend="gloo"), dump(3, backend="nccl")
    monkeypatch.setattr(module, "_dump_fr_trace_json", lambda: gloo, raising=False)
    monkeypatch.setattr(module, "_dump_nccl_trace_json", lambda: nccl, raising=False)

    found = group.flight(2)

    assert [(each.at, each.kind, each.bytes) for each in found] == [
        (3, "all_reduce", 48),
        (5, "all_reduce", 48),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ranks_on_gpus_that_are_not_there_are_refused(tmp_path):
    """A usage error that says what to type, not the end of every rank."""
    with pytest.raises(UsageError, match="no-gpu"):
        case_of(tmp_path, "pass", device="cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: nccl has no other device")
def test_ranks_on_gpus(tmp_path):
    """The same loop, each rank on its GPU, over nccl."""
    path = tmp_path / "subject.py"
    moved = textwrap.dedent(LOOP).format(fault="pass")
    moved = moved.replace("rank, world_size):", "rank, world_size, device):\n    model.to(device)")
    path.write_text(moved.replace("model(x)", "model(x.to(device))"), encoding="utf-8")
    ranks = min(2, torch.cuda.device_count())

    [case] = equivcheck.measure(
        str(path), accumulation_steps=2, world_size=ranks, strategy="ddp", device="cuda"
    ).cases

    assert case["verdict"] == "equivalent", case


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


def test_the_memory_of_a_reference_is_given_back_and_nothing_else(tmp_path):
    """Beyond what is kept in memory too: released tensors are read again, and what was written to others stays."""
    shelf, arena = Shelf(), wire.Arena(tmp_path / "arena")
    first, second = (shelf.keep(torch.randn(5_000_000, dtype=torch.float64)) for _ in range(2))
    kept = Kept(
        {"w": first}, {"w": first}, {"w": second}, {}, {"w": {"step": 1}}, {}, release=shelf.release
    )
    batch = torch.randn(5000)

    message = arena.dumps((kept, batch))
    found, other = wire.loads(message, wire.Mapped(tmp_path / "arena"))
    other.zero_()
    found.release()

    assert found.gradients["w"] is found.applied["w"]
    assert torch.equal(found.gradients["w"], first)
    assert torch.equal(found.after["w"], second)
    assert not other.any()
    shelf.close()
    arena.close()


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
