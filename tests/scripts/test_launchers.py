"""Scripts of frameworks and under launchers, none of which knows equivcheck: right ones agree, faults are named.

What needs a framework is skipped by name where it is missing; `make test-frameworks` runs it in its own environment.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from tests.scripts.conftest import causes, command

slow = pytest.mark.slow
BIN = Path(sys.executable).parent
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
# For CPUs accelerate starts several processes by way of torchrun alone, and only where it is told so.
ACCELERATE = (
    *(BIN / "accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1),
    *("--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"),
)


def needs(name):
    """Return the marks of a test that runs in the environment of a framework."""
    missing = importlib.util.find_spec(name) is None
    return (
        getattr(pytest.mark, {"accelerate": "transformers"}.get(name, name)),
        pytest.mark.skipif(missing, reason=f"{name} is not installed: make test-frameworks"),
        pytest.mark.timeout(900),
    )


def told(entry):
    return entry["headline"], causes(entry), entry["notes"], entry.get("error")


def fault(mistake):
    return ("--mistake", mistake) if mistake else ()


def decided(
    decide, script, mistake, *, full=(), accumulated, launcher=(sys.executable,), **options
):
    wrong = fault(mistake)
    return decide(
        command(script, *full, *wrong),
        command(script, *accumulated, *wrong, launcher=launcher),
        **options,
    )


def is_right(entry, *, accumulation_steps, world_size=1):
    assert entry["verdict"] == "equivalent", told(entry)
    assert (entry["accumulation_steps"], entry["world_size"]) == (accumulation_steps, world_size)
    assert entry["detection_power"] < (1e-9 if entry.get("judged") != "native" else 1e-3)


def is_proved(entry, code):
    assert entry["verdict"] == "divergent", told(entry)
    assert causes(entry) == [(code, "proved")], told(entry)


DDP = {"accumulated": ("--batch-size", 2, "--accum", 4), "launcher": TORCHRUN}


@slow
def test_two_processes_of_torchrun_are_one_full_batch(decide):
    """The full batch in one process, against four micro-batches on each of two ranks with no_sync."""
    entry = decided(decide, "ddp", None, **DDP)

    is_right(entry, accumulation_steps=4, world_size=2)


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        ("missing-division", "EQ101"),
        ("never-synchronised", "EQ502"),
        ("sum-over-ranks", "EQ504"),
        ("zero-in-cycle", "EQ301"),
    ],
)
def test_a_fault_on_two_ranks_is_proved(decide, mistake, code):
    is_proved(decided(decide, "ddp", mistake, **DDP), code)


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        (None, None),
        ("missing-division", "EQ101"),
        ("sum-over-ranks", "EQ504"),
    ],
)
def test_a_model_that_is_sharded_before_it_is_seen(decide, mistake, code):
    """fully_shard over two ranks, one parameter in shards of unequal size, against the whole model in one process."""
    entry = decided(decide, "fsdp2", mistake, **DDP)

    if code is None:
        is_right(entry, accumulation_steps=4, world_size=2)
    else:
        is_proved(entry, code)
        assert entry["attribution"]["reference_residual"] < 1e-12


HF = {"accumulated": ("--batch-size", 2, "--accum", 4)}


@pytest.mark.parametrize("mistake", [pytest.param(None, marks=needs("transformers"))])
def test_transformers_trainer_weighs_every_token_alike(decide, mistake):
    is_right(decided(decide, "hf_trainer", mistake, **HF), accumulation_steps=4)


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        pytest.param("mean-of-means", "EQ103", marks=needs("transformers")),
        pytest.param("clip-in-cycle", "EQ306", marks=needs("transformers")),
    ],
)
def test_a_fault_in_a_script_of_transformers_is_proved(decide, mistake, code):
    entry = decided(decide, "hf_trainer", mistake, **HF)

    is_proved(entry, code)
    if code == "EQ103":
        weights = entry["attribution"]
        assert weights["candidate_weights"] == pytest.approx([0.25] * 4)
        assert weights["reference_weights"] != pytest.approx([0.25] * 4)


LIGHTNING = {"accumulated": ("--batch-size", 4, "--accum", 4)}


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        pytest.param(None, None, marks=needs("lightning")),
        pytest.param("sum-of-means", "EQ101", marks=needs("lightning")),
        pytest.param("zero-in-cycle", "EQ301", marks=needs("lightning")),
    ],
)
def test_a_script_of_lightning(decide, mistake, code):
    entry = decided(decide, "lightning_fit", mistake, **LIGHTNING)

    if code is None:
        is_right(entry, accumulation_steps=4)
    else:
        is_proved(entry, code)


LAUNCHED = {"accumulated": ("--batch-size", 2, "--accum", 4), "launcher": ACCELERATE}


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        pytest.param(None, None, marks=needs("accelerate")),
        pytest.param("divided-twice", "EQ102", marks=needs("accelerate")),
        pytest.param("zero-in-cycle", "EQ301", marks=needs("accelerate")),
        pytest.param("schedule-of-one", "EQ507", marks=needs("accelerate")),
    ],
)
def test_accelerate_launch_with_two_processes(decide, monkeypatch, mistake, code):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    entry = decided(decide, "accelerate_loop", mistake, **LAUNCHED)

    if code is None:
        is_right(entry, accumulation_steps=4, world_size=2)
    else:
        is_proved(entry, code)


@pytest.mark.parametrize(
    ("stage", "ranks", "mistake", "code"),
    [
        pytest.param(0, 1, None, None, marks=needs("deepspeed")),
        pytest.param(2, 1, None, None, marks=needs("deepspeed")),
        pytest.param(0, 1, "divided-twice", "EQ102", marks=needs("deepspeed")),
    ],
)
def test_a_script_of_deepspeed(decide, monkeypatch, stage, ranks, mistake, code):
    """Its engine accumulates, at any stage, and clips as its default says: the factor is seen below the clip."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PATH", os.pathsep.join([str(BIN), os.environ["PATH"]]))
    entry = decided(
        decide,
        "deepspeed_zero",
        mistake,
        full=("--stage", stage),
        accumulated=("--stage", stage, "--batch-size", 4 // ranks, "--accum", 4),
        launcher=TORCHRUN if ranks > 1 else (sys.executable,),
    )

    if code is None:
        is_right(entry, accumulation_steps=4, world_size=ranks)
    else:
        is_proved(entry, code)
