"""Logging: the loss that is shown is the loss that is trained on, once per optimizer step."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, part

MUTANTS, TRAINERS = "../fixtures/mutants", "../fixtures/trainers"
COUNTING = "../fixtures/suite_trainers/counting.py"
FEW = (2, 4)

row = partial(
    Workload,
    build=part("../fixtures/models/normed.py:Normed", norm="layer"),
    batches=part("../fixtures/batches/digits.py:classification", number=3, rows=16),
    logs=True,
)
SHOWN = "the shares of a cycle add up to the loss of the full batch"
WRONG = "the number shown is another one; huggingface/transformers#34191 is an example"

WORKLOADS = [
    row("per_optimizer_step", equivalent(SHOWN), claims=("C18",)),
    row(
        "with_a_tail",
        equivalent(SHOWN),
        batches=part(
            "../fixtures/batches/digits.py:classification", number=3, rows=16, last_rows=5
        ),
    ),
    row(
        "every_micro_batch",
        equivalent("K numbers for one update are no log of updates, so that none is judged"),
        train=part(f"{COUNTING}:every_micro_batch"),
        accumulation_steps=FEW,
    ),
    row(
        "steps_counted",
        equivalent("one for each update: Lightning-AI/pytorch-lightning#832"),
        build=part("../fixtures/models/normed.py:Counted"),
        train=part(f"{COUNTING}:train"),
        accumulation_steps=FEW,
        claims=("C18",),
    ),
    row(
        "steps_counted_per_micro_batch",
        divergent("EQ309", source="K for each update: Lightning-AI/pytorch-lightning#832"),
        build=part("../fixtures/models/normed.py:Counted"),
        train=part(f"{COUNTING}:train", each="micro_batch"),
        accumulation_steps=FEW,
        claims=("C18",),
    ),
    Workload("logged", equivalent(SHOWN), **loop(f"{TRAINERS}/logged.py"), logs=True),
    *(
        Workload(
            name,
            divergent("EQ701", source=WRONG),
            **loop(f"{MUTANTS}/eq701_{name}.py"),
            logs=True,
            accumulation_steps=FEW,
            claims=("C18",) if name == "last_micro_batch" else (),
        )
        for name in ("last_micro_batch", "divided_twice", "summed_twice", "mean_of_means")
    ),
]
