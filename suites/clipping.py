"""Clipping: of the whole cycle's gradient, once, before the step."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, part

CLIPPING = "../fixtures/suite_trainers/clipping.py:train"
MUTANTS = "../fixtures/mutants"

row = partial(
    Workload,
    build=part("../fixtures/models/normed.py:Normed", norm="layer"),
    batches=part("../fixtures/batches/digits.py:classification", number=2, rows=16),
)
ONCE = "a function of the accumulated gradient: Pascanu et al., arXiv 1211.5063, section 3.2"
FEW = (2, 4)

WORKLOADS = [
    row("norm_inactive", equivalent(ONCE), max_norm=1e6),
    row("norm_active", equivalent(ONCE), max_norm=1e-3, claims=("C10",)),
    row("norm_half", equivalent(ONCE), max_norm=0.5),
    row("norm_borderline", equivalent(ONCE), max_norm=1.0),
    row(
        "norm_active_adam",
        equivalent(ONCE),
        max_norm=1e-3,
        optimizer=part("torch.optim:AdamW", lr=1e-2),
    ),
    row("value", equivalent(ONCE), train=part(CLIPPING, how="value")),
    row("per_parameter", equivalent(ONCE), train=part(CLIPPING, how="parameter")),
    row(
        "adaptive",
        equivalent("a function of the accumulated gradient: Brock et al., arXiv 2102.06171"),
        train=part(CLIPPING, how="adaptive"),
    ),
    row(
        "adaptive_inactive",
        equivalent("Brock et al., arXiv 2102.06171"),
        train=part(CLIPPING, how="adaptive", limit=1e3),
    ),
    *(
        row(
            f"{name}_inactive",
            equivalent("a clip that never acts"),
            train=part(CLIPPING, how=how, limit=1e3),
            accumulation_steps=FEW,
        )
        for name, how in (("value", "value"), ("per_parameter", "parameter"))
    ),
    row(
        "per_parameter_after_each_micro_batch",
        divergent("EQ306", source="a clip of a part is not a part of the clip"),
        train=part(CLIPPING, how="parameter", each="micro_batch"),
        accumulation_steps=FEW,
        splits=("even",),
    ),
    row(
        "norm_per_micro_batch",
        divergent("EQ306", source="a clip of a part is not a part of the clip"),
        max_norm=1e-3,
        train=part("../fixtures/suite_trainers/per_micro_batch.py:clip"),
        claims=("C10",),
    ),
    row(
        "norm_per_micro_batch_inactive",
        equivalent("a clip that never acts"),
        max_norm=1e6,
        train=part("../fixtures/suite_trainers/per_micro_batch.py:clip"),
    ),
    Workload(
        "value_per_micro_batch",
        divergent("EQ306", source="a clip of a part is not a part of the clip"),
        **loop(f"{MUTANTS}/eq306_clip_by_value.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "before_unscale",
        divergent("EQ405", source="the threshold is compared with scaled gradients"),
        **loop(f"{MUTANTS}/eq405_clip_before_unscale.py"),
        accumulation_steps=(2,),
        splits=("even",),
    ),
]
