"""Tails: the last, incomplete cycle of an epoch is dropped, or divided by what it holds."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, part

DIGITS = "../fixtures/batches/digits.py"
MUTANTS, TRAINERS = "../fixtures/mutants", "../fixtures/trainers"
TRAINERS_OF_SUITES = "../fixtures/suite_trainers"

row = partial(Workload, build=part("../fixtures/models/normed.py:Normed", norm="layer"))
OWN = "divided by what it holds, a short cycle is a short full batch"
FEW = (2, 4)
GROW = "Smith et al., Don't Decay the Learning Rate, Increase the Batch Size, arXiv 1711.00489"

WORKLOADS = [
    row(
        f"tail_of_{rows}",
        equivalent(OWN),
        batches=part(f"{DIGITS}:classification", number=3, rows=16, last_rows=rows),
        claims=("C17",),
    )
    for rows in (4, 5, 8, 11)
] + [
    Workload(
        "divided_by_its_own",
        equivalent(OWN),
        **loop(f"{TRAINERS}/tail.py"),
        splits=("even",),
        claims=("C17",),
    ),
    row(
        "growing",
        equivalent(GROW),
        batches=part(f"{DIGITS}:growing", sizes=(8, 12, 16)),
        accumulation_steps=(2, 4, 8),
        claims=("C27",),
    ),
    row(
        "growing_twofold",
        equivalent(GROW),
        batches=part(f"{DIGITS}:growing", sizes=(8, 16, 32)),
        accumulation_steps=(2, 4, 8),
        claims=("C27",),
    ),
    row(
        "growing_accumulation_steps",
        equivalent(GROW),
        batches=part(f"{DIGITS}:growing", sizes=(4, 8, 16)),
        train=part(f"{TRAINERS_OF_SUITES}/warm_up.py:train", sizes=(4, 8, 16)),
        accumulation_steps=FEW,
        claims=("C27",),
    ),
    *(
        row(
            f"without_a_length_tail_of_{rows}",
            equivalent(OWN),
            batches=part(f"{DIGITS}:classification", number=3, rows=16, last_rows=rows),
            train=part(f"{TRAINERS_OF_SUITES}/stream.py:train"),
            accumulation_steps=FEW,
            claims=("C17",),
        )
        for rows in (4, 5)
    ),
    row(
        "without_a_length_unflushed",
        divergent("EQ304", source="what is left at the end never reaches the optimizer"),
        batches=part(f"{DIGITS}:classification", number=3, rows=16, last_rows=4),
        train=part(f"{TRAINERS_OF_SUITES}/stream.py:train", flushes=False),
        accumulation_steps=FEW,
        splits=("even",),
        claims=("C17",),
    ),
    Workload(
        "dropped",
        divergent("EQ304", source="its samples never reach the optimizer"),
        **loop(f"{MUTANTS}/eq304_dropped_tail.py"),
        accumulation_steps=FEW,
        splits=("even",),
        claims=("C17",),
    ),
    Workload(
        "divided_by_k",
        divergent("EQ105", source="M of K micro-batches divided by K are M/K too small"),
        **loop(f"{MUTANTS}/eq105_wrong_tail_divisor_samples.py"),
        accumulation_steps=(4,),
        splits=("even",),
        claims=("C17",),
    ),
    Workload(
        "leaks",
        divergent("EQ310", source="it joins the first cycle of the next epoch"),
        **loop(f"{MUTANTS}/eq310_tail_leak.py"),
        accumulation_steps=(4,),
        splits=("even",),
    ),
]
