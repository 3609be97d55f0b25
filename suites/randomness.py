"""Randomness: masks are another draw in a micro-batch, unless they are keyed by the sample."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, ends_in, equivalent, loop, part

NOISY = "../fixtures/models/normed.py:Noisy"
MUTANTS, TRAINERS = "../fixtures/mutants", "../fixtures/trainers"

row = partial(
    Workload, batches=part("../fixtures/batches/digits.py:classification", number=2, rows=16)
)
OFF = "dropout is switched off in all runs"
KEYED = "a mask that depends on sample and call alone is the same in every batch"
UNKEYED = "another draw for every micro-batch"

SOURCES = (
    "dropout",
    "functional",
    "attention",
    "packed_attention",
    "drop_path",
    "bernoulli_path",
    "noise",
    "augment",
)
CHECKPOINTED = ("dropout", "attention", "noise")

WORKLOADS = [
    *(
        row(source, equivalent(OFF), build=part(NOISY, source=source))
        for source in ("dropout", "functional", "attention", "packed_attention")
    ),
    row(
        "recurrent",
        equivalent("its state begins with each sample"),
        build=part("../fixtures/models/lstm.py:LSTM"),
        batches=part("../fixtures/batches/text.py:causal", number=2, rows=16),
        loss=part("../fixtures/losses.py:Tokens"),
    ),
    row(
        "recurrent_stateful",
        divergent("EQ309", source="a micro-batch begins where the one before it has ended"),
        build=part("../fixtures/models/lstm.py:Stateful"),
        batches=part("../fixtures/batches/text.py:causal", number=2, rows=16),
        loss=part("../fixtures/losses.py:Tokens"),
        accumulation_steps=(2, 4),
    ),
    row(
        "checkpointed",
        equivalent("recomputing repeats the forward"),
        build=part(NOISY, source="none", remember=True),
    ),
    *(
        row(
            f"{source}_keyed{'_checkpointed' if remember else ''}",
            equivalent(KEYED),
            build=part(NOISY, source=source, remember=remember),
            rng="per-sample",
        )
        for source in SOURCES
        for remember in (False, True)
        if source in CHECKPOINTED or not remember
    ),
    row(
        "shared_mask",
        ends_in("inconclusive", UNKEYED, "EQ602"),
        build=part(NOISY, source="shared"),
        rng="per-sample",
        accumulation_steps=(2, 4),
    ),
    Workload(
        "unseeded_noise",
        ends_in("inconclusive", UNKEYED, "EQ602"),
        **loop(f"{MUTANTS}/eq602_unseeded_noise.py"),
        accumulation_steps=(2, 4),
    ),
]
