"""A run that a launcher has started: every process keeps one rank, and all end with the same exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from equivcheck.errors import UsageError
from equivcheck.ranks import launched
from equivcheck.ranks.hosts import LOOK

# Several times torch is loaded by two processes at once: on a busy machine each test takes a minute or two.
pytestmark = pytest.mark.timeout(900)

LOOP = """
import os, signal
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

def build():
    return nn.Linear(4, 2)

def batches():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(8, 4, generator=g) for _ in range(3)]

def train(model, loader, accumulation_steps, rank, world_size):
    if world_size > 1:
        assert os.environ["WORLD_SIZE"] == str(world_size)
        dist.init_process_group("gloo")
        model = DDP(model)
    else:
        assert "RANK" not in os.environ
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, x in enumerate(loader):
        if world_size > 1 and rank == 1 and i == 2:
            {fault}
        model.require_backward_grad_sync = (i + 1) % accumulation_steps == 0
        (model(x).square().mean() / {divisor}).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


def written(folder, *, fault="pass", divisor="accumulation_steps"):
    path = Path(folder) / "loop.py"
    path.write_text(textwrap.dedent(LOOP).format(fault=fault, divisor=divisor), encoding="utf-8")
    return path


def clean():
    """Return the environment without what a launcher of these very tests may have set."""
    ours = launched.NEEDED + launched.ONES
    return {
        k: v for k, v in os.environ.items() if k not in ours and not k.startswith("TORCHELASTIC")
    }


def torchrun(*arguments, folder, **named):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=clean(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **named,
    )


RUN = ("-m", "equivcheck", "run", "loop.py", "--strategy", "ddp", "--accumulation-steps", "2")


def processes_naming(marker):
    """Return the ids of processes whose working folder is the test's own."""
    found = []
    for each in Path("/proc").iterdir():
        if each.name.isdigit():
            try:
                place = str((each / "cwd").readlink())
            except OSError:
                continue
            if place == str(marker):
                found.append(int(each.name))
    return found


def none_left(folder, within=10.0):
    until = time.monotonic() + within
    while left := processes_naming(folder):
        if time.monotonic() > until:
            return left
        time.sleep(0.1)
    return []


def by_hand(folder, size, *extra):
    """Start the command once per rank, as a launcher without a store of its own does."""
    port = free_port()
    found = []
    for rank in range(size):
        told = {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        found.append(
            subprocess.Popen(
                [sys.executable, *RUN, *extra],
                cwd=folder,
                env={**clean(), **told},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def free_port():
    from equivcheck.ranks.group import free_port as free

    return free()


def finished(processes, timeout=400):
    """Return exit code, stdout and stderr of each; none of them outlives the test."""
    try:
        said = [each.communicate(timeout=timeout) for each in processes]
    finally:
        for each in processes:
            each.kill()
    return [(each.returncode, *texts) for each, texts in zip(processes, said, strict=True)]


@pytest.mark.slow
def test_torchrun_on_one_machine(tmp_path):
    """Two processes of one agent: one result, which rank 0 reports, and no process left."""
    written(tmp_path)

    [(code, out, err)] = finished(
        [torchrun("--nproc-per-node", "2", *RUN, "--json", "-", folder=tmp_path)]
    )

    assert code == 0, err
    result = json.loads(out)
    assert result["verdict"] == "equivalent"
    assert result["cases"][0]["world_size"] == 2
    assert [each["rank"] for each in result["cases"][0]["ranks"]] == [0, 1]
    assert none_left(tmp_path) == []


@pytest.mark.slow
def test_two_agents_of_torchrun(tmp_path):
    """Two agents that meet at an address, as on two machines."""
    written(tmp_path)
    port = free_port()
    agents = [
        torchrun(
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
            *("--master-addr", "127.0.0.1", "--master-port", str(port)),
            *(*RUN, "--json", f"result-{node}.json"),
            folder=tmp_path,
        )
        for node in range(2)
    ]

    ended = finished(agents)

    assert [code for code, *_ in ended] == [0, 0], ended
    assert not (tmp_path / "result-1.json").exists()
    assert json.loads((tmp_path / "result-0.json").read_text())["verdict"] == "equivalent"
    assert none_left(tmp_path) == []


@pytest.fixture
def two_networks():
    """Two network namespaces with a cable between them, each with its own loopback: as two machines have."""
    names = [f"eq-{os.getpid()}-{n}" for n in range(2)]
    cables = [f"eqv{os.getpid() % 100000}{n}" for n in range(2)]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
            for n, (name, cable) in enumerate(zip(names, cables, strict=True)):
                ip("link", "set", cable, "netns", name)
                ip("-n", name, "addr", "add", f"10.213.77.{n + 1}/24", "dev", cable)
                ip("-n", name, "link", "set", cable, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or str(error)
            pytest.skip(f"no network namespaces here: {said.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_machines(tmp_path, two_networks):
    """Two hosts that share no loopback: the ranks find the network between them, and the result is the same."""
    written(tmp_path)
    agents = [
        subprocess.Popen(
            [
                *("ip", "netns", "exec", name),
                *(sys.executable, "-W", "ignore", "-m", "torch.distributed.run"),
                *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)),
                *("--master-addr", "10.213.77.1", "--master-port", "29511"),
                *(*RUN, "--json", f"result-{node}.json"),
            ],
            cwd=tmp_path,
            env=clean(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for node, name in enumerate(two_networks)
    ]

    ended = finished(agents)

    assert [code for code, *_ in ended] == [0, 0], ended
    result = json.loads((tmp_path / "result-0.json").read_text())
    assert result["verdict"] == "equivalent"
    assert none_left(tmp_path) == []


def test_every_process_ends_with_the_same_code(tmp_path):
    """A fault is found, by a launcher that serves no store of its own: 1 everywhere, one result, two cases."""
    written(tmp_path, divisor="1")

    ended = finished(by_hand(tmp_path, 2, "--accumulation-steps", "2,4", "--json", "result.json"))

    assert [code for code, *_ in ended] == [1, 1], ended
    assert ended[1][1] == ""
    result = json.loads((tmp_path / "result.json").read_text())
    assert [case["causes"][0]["code"] for case in result["cases"]][1] == "EQ101"
    assert none_left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told", "seconds"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was killed by signal 9", 200),
        ("raise ValueError('bad row')", "ValueError: bad row", 200),
        ("import time; time.sleep(1000)", "timed-out", 60),
    ],
    ids=["killed", "raises", "hangs"],
)
def test_a_rank_that_fails_ends_all(tmp_path, fault, told, seconds):
    """Within the time allowed every process has ended, with one code, and the rank and its step are named."""
    written(tmp_path, fault=fault)

    ended = finished(by_hand(tmp_path, 2, "--timeout", str(seconds), "--json", "result.json"))

    assert [code for code, *_ in ended] == [3, 3], ended
    [case] = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert told in case["error"]["message"]
    assert case["seconds"] < seconds + 5
    assert "rank 1" in case["error"]["message"] + case["error"]["where"]
    assert "optimizer_step 1" in case["error"]["where"]
    assert none_left(tmp_path) == []


@pytest.mark.slow
def test_a_launched_process_that_is_killed(tmp_path):
    """The others end as with a rank that died; cases that were finished are kept."""
    written(tmp_path, fault="open('here', 'w').close(); import time; time.sleep(1000)")
    processes = by_hand(tmp_path, 2, "--timeout", "200", "--json", "result.json")
    until = time.monotonic() + 60
    while not (tmp_path / "here").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(5 * LOOK)  # Its place is known to the others from the last look of its host.

    processes[1].send_signal(signal.SIGKILL)
    ended = finished(processes)

    assert [code for code, *_ in ended] == [3, -9], ended
    [case] = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert "rank 1 has gone" in case["error"]["message"]
    assert "optimizer_step 1" in case["error"]["where"]
    assert none_left(tmp_path) == []


@pytest.mark.slow
def test_the_first_process_is_killed(tmp_path):
    """Nobody is left who could tell: the others end by themselves."""
    written(tmp_path, fault="open('here', 'w').close(); import time; time.sleep(1000)")
    processes = by_hand(tmp_path, 2, "--timeout", "200")
    until = time.monotonic() + 60
    while not (tmp_path / "here").exists() and time.monotonic() < until:
        time.sleep(0.05)

    processes[0].send_signal(signal.SIGKILL)
    ended = finished(processes)

    assert [code for code, *_ in ended] == [-9, 3], ended
    assert "rank 0 has gone" in ended[1][2]
    assert none_left(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (("--world-size", "4"), "--world-size 4 in a group of 2 processes"),
        (("-j", "2"), "--jobs 2 in a group of 2 processes"),
        (("--full", "python a.py"), "command lines in a launched group"),
    ],
    ids=["world-size", "jobs", "full"],
)
def test_what_makes_no_sense_is_refused_everywhere(tmp_path, extra, told):
    """Exit code 2 in every process, and one message."""
    written(tmp_path)

    ended = finished(by_hand(tmp_path, 2, *extra))

    assert [code for code, *_ in ended] == [2, 2], ended
    assert told in ended[0][2]
    assert told not in ended[1][2]


def test_a_process_on_its_own_belongs_to_no_group():
    """One variable missing, or a group of one."""
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}

    assert launched.found({}) is None
    assert launched.found({**whole, "WORLD_SIZE": "1"}) is None
    assert all(
        launched.found({k: v for k, v in whole.items() if k != name}) is None for name in whole
    )
    assert launched.found(whole).rank == 1


@pytest.mark.parametrize(
    "wrong", [{"RANK": "x"}, {"RANK": "2"}, {"RANK": "-1"}, {"MASTER_PORT": "http"}]
)
def test_numbers_that_are_none_are_refused(wrong):
    """A usage error that says which variable to unset."""
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "9"}

    with pytest.raises(UsageError, match="launcher: "):
        launched.found({**whole, **wrong})


def test_the_full_batch_sees_no_launcher(monkeypatch):
    """What the launcher has set is away, and comes back."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "9",
    }.items():
        monkeypatch.setenv(name, value)
    launch = launched.found()

    with launched.alone(launch):
        assert "RANK" not in os.environ
    assert os.environ["RANK"] == "0"
