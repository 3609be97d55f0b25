"""Optimizers: each is a function of the accumulated gradient and its own state, advanced once per cycle."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, part

MUTANTS, TRAINERS = "../fixtures/mutants", "../fixtures/trainers"

row = partial(
    Workload,
    build=part("../fixtures/models/normed.py:Normed", norm="layer"),
    batches=part("../fixtures/batches/digits.py:classification", number=2, rows=16),
)
STEP = "a function of gradient and state: the update is the same where the gradient is"
FEW = (2, 4)

OPTIMIZERS = {
    "sgd": part("torch.optim:SGD", lr=0.1),
    "sgd_momentum": part("torch.optim:SGD", lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd_nesterov": part("torch.optim:SGD", lr=0.1, momentum=0.9, nesterov=True),
    "sgd_foreach": part("torch.optim:SGD", lr=0.1, momentum=0.9, foreach=True),
    "sgd_fused": part("torch.optim:SGD", lr=0.1, momentum=0.9, fused=True),
    "adam": part("torch.optim:Adam", lr=1e-2),
    "adam_amsgrad": part("torch.optim:Adam", lr=1e-2, amsgrad=True),
    "adam_foreach": part("torch.optim:Adam", lr=1e-2, foreach=True),
    "adam_fused": part("torch.optim:Adam", lr=1e-2, fused=True),
    "adamw": part("torch.optim:AdamW", lr=1e-2, weight_decay=0.1),
    "adamw_fused": part("torch.optim:AdamW", lr=1e-2, fused=True),
    "adamax": part("torch.optim:Adamax", lr=1e-2),
    "adagrad": part("torch.optim:Adagrad", lr=1e-2),
    "adagrad_fused": part("torch.optim:Adagrad", lr=1e-2, fused=True),
    "adadelta": part("torch.optim:Adadelta", lr=0.5),
    "asgd": part("torch.optim:ASGD", lr=1e-2),
    "nadam": part("torch.optim:NAdam", lr=1e-2),
    "radam": part("torch.optim:RAdam", lr=1e-2),
    "rmsprop": part("torch.optim:RMSprop", lr=1e-3, momentum=0.9, centered=True),
    "rprop": part("torch.optim:Rprop", lr=1e-2),
    "adafactor": part("torch.optim:Adafactor", lr=1e-2),
    "parameter_groups": part("../fixtures/optimizers.py:decay_on_matrices"),
}
# Several tensors at once; fused ones are above, where a CPU has them.
FOREACH = {
    "adamw": "AdamW",
    "adamax": "Adamax",
    "adagrad": "Adagrad",
    "adadelta": "Adadelta",
    "asgd": "ASGD",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "rprop": "Rprop",
    "adafactor": "Adafactor",
}

WORKLOADS = [
    *(row(name, equivalent(STEP), optimizer=each) for name, each in OPTIMIZERS.items()),
    *(
        row(
            f"{name}_foreach",
            equivalent(STEP),
            optimizer=part(f"torch.optim:{kind}", lr=1e-2, foreach=True),
            accumulation_steps=(4,),
            splits=("even",),
        )
        for name, kind in FOREACH.items()
    ),
    row(
        "muon",
        equivalent(STEP),
        build=part("../fixtures/models/normed.py:matrices"),
        optimizer=part("torch.optim:Muon", lr=1e-2),
    ),
    row(
        "sparse_adam",
        equivalent("sparse gradients are summed as dense ones are; the same rows have them"),
        build=part("../fixtures/models/normed.py:Counts"),
        optimizer=part("torch.optim:SparseAdam", lr=1e-2),
    ),
    row(
        "sparse_sgd",
        equivalent("sparse gradients are summed as dense ones are"),
        build=part("../fixtures/models/normed.py:Counts"),
        optimizer=part("torch.optim:SGD", lr=0.1),
        accumulation_steps=FEW,
    ),
    row(
        "momentum_unused",
        equivalent("without a gradient there is no step: torch.optim.SGD skips None"),
        build=part("../fixtures/models/normed.py:Unused"),
        optimizer=part("torch.optim:SGD", lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    Workload("lbfgs", equivalent(STEP), **loop(f"{TRAINERS}/lbfgs.py"), accumulation_steps=FEW),
    Workload("several", equivalent(STEP), **loop(f"{TRAINERS}/two_optimizers.py")),
    Workload("ema", equivalent("averaged once per optimizer step"), **loop(f"{TRAINERS}/ema.py")),
    Workload(
        "swa", equivalent("Izmailov, arXiv 1803.05407"), **loop(f"{TRAINERS}/ema_averaged_model.py")
    ),
    Workload(
        "ema_per_micro_batch",
        divergent("EQ309", source="the average moves K times: Tarvainen, arXiv 1703.01780"),
        **loop(f"{MUTANTS}/eq309_ema_in_a_dict.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "swa_per_micro_batch",
        divergent("EQ309", source="the average moves K times"),
        **loop(f"{MUTANTS}/eq309_averaged_model.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "momentum_in_cycle",
        divergent("EQ312", source="the momentum decays with every micro-batch"),
        **loop(f"{MUTANTS}/eq312_momentum_decay.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "weight_decay_in_cycle",
        divergent("EQ312", source="the weights decay with every micro-batch"),
        **loop(f"{MUTANTS}/eq312_weight_decay_in_cycle.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "zeros_for_none",
        divergent("EQ508", source="momentum and decay move a parameter with a gradient of zeros"),
        **loop(f"{MUTANTS}/eq508_zeros_for_none.py"),
        accumulation_steps=FEW,
    ),
]
