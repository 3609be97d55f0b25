"""Mixed precision: scaling and casting commute with the sum over micro-batches, if each happens in its place."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, loses_precision, part

DIGITS = "../fixtures/batches/digits.py:classification"
MUTANTS, TRAINERS = "../fixtures/mutants", "../fixtures/trainers"

row = partial(
    Workload,
    build=part("../fixtures/models/normed.py:Normed", norm="layer"),
    batches=part(DIGITS, number=2, rows=16),
)
RECIPE = "docs.pytorch.org/docs/stable/notes/amp_examples.html#gradient-accumulation"
SAME = "the same function in float64; rounding in the working precision is no fault"
SCALING = "../fixtures/suite_trainers/scaling.py:train"
SKIPPED = (
    "an inf in any gradient skips the whole step, in the full batch as well: "
    "docs.pytorch.org/docs/stable/amp.html#torch.amp.GradScaler.step"
)
FEW = (2, 4)

WORKLOADS = [
    row("bf16", equivalent(SAME), precision="bf16"),
    row("fp16", equivalent(RECIPE), precision="fp16", claims=("C13",)),
    row("fp16_clipped", equivalent(RECIPE), precision="fp16", max_norm=0.1, claims=("C13",)),
    row("bf16_clipped", equivalent(SAME), precision="bf16", max_norm=0.1),
    row(
        "fp16_adam",
        equivalent(RECIPE),
        precision="fp16",
        optimizer=part("torch.optim:AdamW", lr=1e-2),
    ),
    row(
        "bf16_adam",
        equivalent(SAME),
        precision="bf16",
        optimizer=part("torch.optim:AdamW", lr=1e-2),
    ),
    row(
        "fp16_scale_grows_every_step",
        equivalent("a power of two scales no digit: the scale cancels, whatever it is"),
        batches=part(DIGITS, number=4, rows=16),
        train=part(SCALING, initial=1.0, growth_interval=1),
        accumulation_steps=FEW,
        claims=("C13",),
    ),
    row(
        "fp16_scale_falls_back",
        divergent("EQ404", source=SKIPPED),
        batches=part(DIGITS, number=4, rows=16),
        train=part(SCALING, initial=2.0**24),
        accumulation_steps=FEW,
    ),
    row(
        "fp16_overflow_in_one_micro_batch",
        divergent("EQ404", source=SKIPPED),
        build=part("../fixtures/models/normed.py:Normed", norm="none"),
        batches=part("../fixtures/batches/digits.py:loud"),
        train=part(SCALING),
        accumulation_steps=FEW,
    ),
    Workload("fp16_growing_scale", equivalent(RECIPE), **loop(f"{TRAINERS}/amp_fp16_scaler.py")),
    Workload("float32_master", equivalent(SAME), **loop(f"{TRAINERS}/float32_master.py")),
    Workload(
        "pure_bf16", equivalent(SAME), **loop(f"{TRAINERS}/pure_bf16.py"), accumulation_steps=FEW
    ),
    Workload(
        "scaler_update_in_cycle",
        divergent("EQ402", source="gradients of different scales are added"),
        **loop(f"{MUTANTS}/eq402_scaler_update_in_cycle.py"),
        accumulation_steps=FEW,
        claims=("C13",),
    ),
    Workload(
        "unscale_after_first",
        divergent("EQ403", source="earlier gradients are divided by the scale again"),
        **loop(f"{MUTANTS}/eq403_unscale_after_first.py"),
        accumulation_steps=FEW,
        claims=("C13",),
    ),
    Workload(
        "clip_before_unscale",
        divergent("EQ405", source=RECIPE),
        **loop(f"{MUTANTS}/eq405_clip_before_unscale.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "overflow",
        divergent(
            "EQ404", source="an overflow skips the step, which is the full batch's fault too"
        ),
        **loop(f"{MUTANTS}/eq404_huge_initial_scale.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "bfloat16_buffer",
        loses_precision("adding K numbers errs by u sqrt(K): Higham, section 4.2"),
        **loop(f"{MUTANTS}/eq401_bfloat16_buffer.py"),
    ),
    Workload(
        "bfloat16_buffer_k64",
        loses_precision("adding K numbers errs by u sqrt(K): Higham, section 4.2"),
        **{
            **loop(f"{MUTANTS}/eq401_bfloat16_buffer.py"),
            "batches": part(
                "../fixtures/batches/digits.py:weighted_classification", number=2, rows=64
            ),
        },
        accumulation_steps=(64,),
    ),
]
