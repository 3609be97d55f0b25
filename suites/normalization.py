"""Normalization: what is computed over the batch sees a micro-batch as another batch."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, part

MLP = "../fixtures/models/mlp.py:MLP"
CONVNET = "../fixtures/models/convnet.py:ConvNet"
DIGITS = "../fixtures/batches/digits.py:classification"

row = partial(Workload, batches=part(DIGITS, number=3, rows=16))
per_sample = "statistics of one sample alone: Wu and He, Group Normalization, arXiv 1803.08494"

WORKLOADS = [
    row(
        "layer_norm",
        equivalent("per sample: Ba et al., Layer Normalization, arXiv 1607.06450"),
        build=part(MLP, norm="layer"),
        claims=("C5",),
    ),
    row("group_norm", equivalent(per_sample), build=part(CONVNET, norm="group"), claims=("C5",)),
    row(
        "batch_norm_2d",
        divergent("EQ201", source="Ioffe and Szegedy, Batch Normalization, arXiv 1502.03167"),
        build=part(CONVNET, norm="batch"),
        claims=("C4",),
    ),
]
