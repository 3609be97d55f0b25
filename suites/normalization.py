"""Normalization: what is computed over the batch sees a micro-batch as another batch."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import FULL, Workload, divergent, ends_in, equivalent, loop, part

NORMED = "../fixtures/models/normed.py:Normed"
CONVNET = "../fixtures/models/convnet.py:ConvNet"
DIGITS = "../fixtures/batches/digits.py:classification"
MUTANTS = "../fixtures/mutants"

row = partial(Workload, batches=part(DIGITS, number=2, rows=16))
PER_SAMPLE = "statistics of one sample alone: Wu and He, Group Normalization, arXiv 1803.08494"
OVER_BATCH = "Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167, section 3.1"
ONE_VALUE = "torch refuses a variance of one value: torch/nn/functional.py, _verify_batch_size"
FROZEN = "constants, once the statistics do not follow the batch"
WEIGHTS = "a function of the weights alone: Salimans and Kingma, arXiv 1602.07868"

# An uneven cut of 16 rows into 8 has micro-batches of one row.
SINGLES = (
    ends_in("error", ONE_VALUE, accumulation_steps=FULL),
    ends_in("error", ONE_VALUE, accumulation_steps=8, split="uneven"),
)

WORKLOADS = [
    row("layer_norm", equivalent(PER_SAMPLE), build=part(NORMED, norm="layer"), claims=("C5",)),
    row("group_norm", equivalent(PER_SAMPLE), build=part(NORMED, norm="group"), claims=("C5",)),
    row("rms_norm", equivalent(PER_SAMPLE), build=part(NORMED, norm="rms"), claims=("C5",)),
    row("group_norm_2d", equivalent(PER_SAMPLE), build=part(CONVNET, norm="group")),
    row("instance_norm", equivalent(PER_SAMPLE), build=part(NORMED, norm="instance")),
    row("local_response_norm", equivalent(PER_SAMPLE), build=part(NORMED, norm="local_response")),
    row("weight_norm", equivalent(WEIGHTS), build=part(NORMED, norm="weight")),
    row(
        "spectral_norm",
        divergent("EQ309", source="each forward iterates: Miyato et al., arXiv 1802.05957"),
        build=part(NORMED, norm="spectral"),
    ),
    row(
        "instance_norm_tracked",
        divergent("EQ203", source="per sample, but each forward moves the running statistics"),
        build=part(NORMED, norm="instance_tracked"),
    ),
    row(
        "batch_norm_1d",
        (*SINGLES, divergent("EQ201", source=OVER_BATCH)),
        build=part(NORMED, norm="batch_1d"),
        claims=("C4",),
    ),
    row(
        "batch_norm_2d",
        divergent("EQ201", source=OVER_BATCH),
        build=part(NORMED, norm="batch_2d"),
        claims=("C4",),
    ),
    row(
        "batch_norm_conv", divergent("EQ201", source=OVER_BATCH), build=part(CONVNET, norm="batch")
    ),
    row("batch_norm_frozen", equivalent(FROZEN), build=part(NORMED, norm="batch_frozen")),
    row(
        "batch_norm_cumulative",
        (*SINGLES, divergent("EQ201", source=OVER_BATCH)),
        build=part(NORMED, norm="batch_cumulative"),
    ),
    row(
        "batch_norm_untracked",
        (*SINGLES, divergent("EQ201", source=OVER_BATCH)),
        build=part(NORMED, norm="batch_untracked"),
    ),
    row(
        "batch_norm_functional",
        (*SINGLES, divergent("EQ201", source=OVER_BATCH)),
        build=part(NORMED, norm="functional_batch"),
    ),
    row(
        "batch_norm_ghost",
        (
            ends_in(
                "inconclusive",
                "a cut through ghosts: neighbours decide what the full batch gives, in another order another gradient",
                split="uneven",
            ),
            divergent("EQ201", source="a ghost of one row", accumulation_steps=FULL),
            equivalent("whole ghosts: Hoffer et al., arXiv 1705.08741"),
        ),
        build=part(NORMED, norm="ghost_batch"),
    ),
    Workload(
        "batch_norm_by_hand",
        divergent("EQ201", source=OVER_BATCH),
        **loop(f"{MUTANTS}/eq201_hand_written_batch_norm.py"),
        accumulation_steps=(2, 4),
    ),
    Workload(
        "batch_norm_without_gradient",
        divergent("EQ203", source="its output is not trained on, its statistics are kept"),
        **loop(f"{MUTANTS}/eq203_batch_norm_without_gradient.py"),
        accumulation_steps=(2, 4),
    ),
]
