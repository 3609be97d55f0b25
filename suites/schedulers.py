"""Schedules: counted, and advanced, in optimizer steps."""

from __future__ import annotations

from functools import partial

from equivcheck.case import SPLITS
from equivcheck.suite import HORIZON, Workload, divergent, ends_in, equivalent, loop, part

TORCH = "torch.optim.lr_scheduler"
OWN = "../fixtures/schedules.py"
FAULTS = "../fixtures/suite_trainers/per_micro_batch.py"
MUTANTS = "../fixtures/mutants"

row = partial(
    Workload,
    build=part("../fixtures/models/normed.py:Normed", norm="layer"),
    batches=part("../fixtures/batches/digits.py:classification", number=3, rows=16),
)
# A whole cosine on the ink of four digits at a time, 20 parameters. With --optimizer-steps 1000 it is the usual
# example: 1000 updates, of which a schedule that counts micro-batches at K=4 is through after 250 (a minute or two).
whole = partial(
    Workload,
    build=part("torch.nn:Linear", in_features=1, out_features=10),
    batches=part("../fixtures/batches/digits.py:ink", number=1000, rows=4),
    scheduler=part(f"{OWN}:cosine_to_zero", optimizer_steps=HORIZON),
    optimizer_steps=40,
    accumulation_steps=(4,),
    splits=("even",),
    claims=("C11",),
)
STEP = "docs.pytorch.org/docs/stable/optim.html: scheduler.step() after optimizer.step()"
AHEAD = "K times as many steps of the schedule: Lightning-AI/pytorch-lightning#1476"
LONG = "a horizon of K times as many steps is never reached"

SCHEDULES = {
    "lambda": part(f"{OWN}:decay"),
    "multiplicative": part(f"{OWN}:multiplicative"),
    "step": part(f"{TORCH}:StepLR", step_size=1, gamma=0.5),
    "multi_step": part(f"{TORCH}:MultiStepLR", milestones=[1, 2]),
    "constant": part(f"{TORCH}:ConstantLR", factor=0.5, total_iters=2),
    "linear": part(f"{TORCH}:LinearLR", start_factor=0.2, total_iters=HORIZON),
    "exponential": part(f"{TORCH}:ExponentialLR", gamma=0.9),
    "cosine": part(f"{TORCH}:CosineAnnealingLR", T_max=HORIZON),
    "warm_restarts": part(f"{TORCH}:CosineAnnealingWarmRestarts", T_0=2),
    "polynomial": part(f"{TORCH}:PolynomialLR", total_iters=HORIZON),
    "cyclic": part(
        f"{TORCH}:CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False
    ),
    "one_cycle": part(f"{TORCH}:OneCycleLR", max_lr=0.1, total_steps=HORIZON),
    "plateau": part(f"{TORCH}:ReduceLROnPlateau", patience=0, threshold=0.5),
    "swa": part(f"{TORCH[:-13]}.swa_utils:SWALR", swa_lr=0.01, anneal_epochs=2),
    "sequential": part(f"{OWN}:warm_up_then_cosine", optimizer_steps=HORIZON),
    "chained": part(f"{OWN}:chained"),
    "warm_up_cosine": part(f"{OWN}:cosine_by_hand", optimizer_steps=HORIZON),
}
# The faults of these are looked for at more than one point.
USUAL = ("lambda", "step", "linear", "exponential", "cosine", "polynomial", "warm_up_cosine")

WORKLOADS = [
    *(
        row(name, equivalent(STEP), scheduler=schedule, claims=("C11",) if name == "cosine" else ())
        for name, schedule in SCHEDULES.items()
    ),
    *(
        row(
            f"{name}_per_micro_batch",
            divergent("EQ307", source=AHEAD),
            scheduler=SCHEDULES[name],
            train=part(f"{FAULTS}:schedule"),
            accumulation_steps=(2, 4) if name in USUAL else (4,),
            splits=SPLITS if name in USUAL else ("even",),
            claims=("C11", "C12") if name == "warm_up_cosine" else (),
        )
        for name in SCHEDULES
        if name != "one_cycle"
    ),
    *(
        row(
            f"{name}_horizon",
            divergent("EQ308", source=LONG),
            scheduler=SCHEDULES[name],
            train=part(f"{FAULTS}:horizon"),
            accumulation_steps=(2, 4) if name in USUAL else (4,),
            splits=SPLITS if name in USUAL else ("even",),
        )
        for name in ("linear", "cosine", "polynomial", "one_cycle", "sequential", "warm_up_cosine")
    ),
    row(
        "one_cycle_per_micro_batch",
        ends_in("error", "it refuses to go on after its last step: torch.optim.lr_scheduler"),
        scheduler=SCHEDULES["one_cycle"],
        train=part(f"{FAULTS}:schedule"),
        accumulation_steps=(4,),
        splits=("even",),
    ),
    whole("whole_cosine", equivalent(STEP)),
    whole(
        "whole_cosine_per_micro_batch",
        divergent("EQ307", source="a rate of zero after a quarter of the updates: " + AHEAD),
        train=part(f"{FAULTS}:schedule"),
    ),
    Workload(
        "warm_up_per_micro_batch",
        divergent("EQ307", source="warm-up is counted in optimizer steps: Goyal, arXiv 1706.02677"),
        **loop(f"{MUTANTS}/eq307_warm_up_per_micro_batch.py"),
        accumulation_steps=(2, 4),
        claims=("C12",),
    ),
]
