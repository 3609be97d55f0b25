"""Losses: the right denominator is the cycle's own count; a mean of means is right at equal counts only."""

from __future__ import annotations

from functools import partial

from equivcheck.suite import Workload, divergent, equivalent, loop, part

NORMED = part("../fixtures/models/normed.py:Normed", norm="layer")
GPT = part("../fixtures/models/gpt.py:GPT")
TEXT = part("../fixtures/batches/text.py:causal", number=2, rows=16)
ANNOTATED = part("../fixtures/batches/digits.py:annotated", number=2, rows=16)
VIEWS = part("../fixtures/batches/digits.py:views", number=2, rows=16)
NAIVE = part("../fixtures/suite_trainers/naive.py:train")
LOSSES = "../fixtures/losses.py"
MUTANTS = "../fixtures/mutants"

row = partial(Workload, build=NORMED, batches=ANNOTATED)
text = partial(Workload, build=GPT, batches=TEXT)
grouped = partial(
    Workload, build=GPT, batches=part("../fixtures/batches/text.py:grouped", number=2)
)
ADDS_UP = "sums over the cycle's own count add up to the full batch's mean"
EQUAL = "equal counts: the mean of means is the mean"
FIX = "huggingface.co/blog/gradient_accumulation (2024): a mean of means is not the mean"
COUPLED = "a sample's loss sees the others of its batch: van den Oord et al., arXiv 1807.03748"
UNWEIGHTED = (
    "no weights of micro-batches give it back, those of a mean no less than others: " + COUPLED
)
MINED = "negatives are mined in the batch: Schroff et al., arXiv 1503.03832"

SAMPLES = (divergent("EQ103", source=FIX, split="uneven"), equivalent(EQUAL))
RAGGED = divergent("EQ103", source=FIX)
FEW = (2, 4)

WORKLOADS = [
    row("mean", equivalent(ADDS_UP), loss=part(f"{LOSSES}:CrossEntropy"), claims=("C2", "C9")),
    row(
        "mean_naive", SAMPLES, loss=part(f"{LOSSES}:CrossEntropy"), train=NAIVE, claims=("C2", "C9")
    ),
    row("sum", equivalent("a sum is additive"), loss=part(f"{LOSSES}:Sum")),
    row(
        "sum_naive",
        divergent("EQ108", source="a sum divided by K as if it were a mean"),
        loss=part(f"{LOSSES}:Sum"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    row("squared_error", equivalent(ADDS_UP), loss=part(f"{LOSSES}:SquaredError")),
    row("squared_error_naive", SAMPLES, loss=part(f"{LOSSES}:SquaredError"), train=NAIVE),
    row("batchmean_kl", equivalent(ADDS_UP), loss=part(f"{LOSSES}:BatchMeanKL")),
    row("batchmean_kl_naive", SAMPLES, loss=part(f"{LOSSES}:BatchMeanKL"), train=NAIVE),
    row("class_weights", equivalent(ADDS_UP), loss=part(f"{LOSSES}:ClassWeighted")),
    row("class_weights_naive", RAGGED, loss=part(f"{LOSSES}:ClassWeighted"), train=NAIVE),
    row("label_smoothing", equivalent(ADDS_UP), loss=part(f"{LOSSES}:LabelSmoothing")),
    row("label_smoothing_naive", SAMPLES, loss=part(f"{LOSSES}:LabelSmoothing"), train=NAIVE),
    row("bce_pos_weight", equivalent(ADDS_UP), loss=part(f"{LOSSES}:PositiveWeighted")),
    row("bce_pos_weight_naive", SAMPLES, loss=part(f"{LOSSES}:PositiveWeighted"), train=NAIVE),
    row("bce_masked", equivalent(ADDS_UP), loss=part(f"{LOSSES}:Masked")),
    row("bce_masked_naive", RAGGED, loss=part(f"{LOSSES}:Masked"), train=NAIVE),
    row(
        "ctc",
        equivalent(ADDS_UP),
        build=part("../fixtures/models/normed.py:Sequences"),
        loss=part(f"{LOSSES}:CTC"),
    ),
    row(
        "ctc_naive",
        SAMPLES,
        build=part("../fixtures/models/normed.py:Sequences"),
        loss=part(f"{LOSSES}:CTC"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    row(
        "ctc_per_label",
        equivalent(ADDS_UP),
        build=part("../fixtures/models/normed.py:Sequences"),
        loss=part(f"{LOSSES}:CTC", per="label"),
    ),
    row(
        "ctc_per_label_naive",
        RAGGED,
        build=part("../fixtures/models/normed.py:Sequences"),
        loss=part(f"{LOSSES}:CTC", per="label"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    row("distillation", equivalent(ADDS_UP), loss=part(f"{LOSSES}:Distillation")),
    row("distillation_naive", SAMPLES, loss=part(f"{LOSSES}:Distillation"), train=NAIVE),
    row("preference_pairs", equivalent(ADDS_UP), loss=part(f"{LOSSES}:Preference")),
    row("preference_pairs_naive", SAMPLES, loss=part(f"{LOSSES}:Preference"), train=NAIVE),
    row("two_tasks", equivalent(ADDS_UP), loss=part(f"{LOSSES}:TwoTasks")),
    row(
        "two_tasks_naive",
        (
            divergent("EQ103", source=FIX + ", of either task", split="uneven"),
            divergent("EQ106", source="one task has equal counts, the other, masked, has not"),
        ),
        loss=part(f"{LOSSES}:TwoTasks"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    row("penalised", equivalent("each carries its share"), loss=part(f"{LOSSES}:Penalised")),
    row(
        "penalised_naive",
        SAMPLES,
        loss=part(f"{LOSSES}:Penalised"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    Workload(
        "penalty_per_micro_batch",
        divergent("EQ107", source="K penalties instead of one"),
        **loop(f"{MUTANTS}/eq107_penalty_in_the_loss.py"),
        accumulation_steps=FEW,
    ),
    text("tokens", equivalent(ADDS_UP), loss=part(f"{LOSSES}:Tokens"), claims=("C14",)),
    text(
        "tokens_naive",
        RAGGED,
        loss=part(f"{LOSSES}:Tokens"),
        train=NAIVE,
        claims=("C14",),
    ),
    text("sequences", equivalent(ADDS_UP), loss=part(f"{LOSSES}:Tokens", per="sequence")),
    text(
        "sequences_naive",
        SAMPLES,
        loss=part(f"{LOSSES}:Tokens", per="sequence"),
        train=NAIVE,
    ),
    grouped("policy_tokens", equivalent(ADDS_UP), loss=part(f"{LOSSES}:PolicyGradient")),
    grouped(
        "policy_tokens_naive",
        divergent(
            "EQ103",
            source="huggingface/trl#7206: a mean of each micro-batch is none over all tokens",
        ),
        loss=part(f"{LOSSES}:PolicyGradient"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    grouped(
        "policy_sequences",
        equivalent(ADDS_UP),
        loss=part(f"{LOSSES}:PolicyGradient", per="sequence"),
    ),
    grouped(
        "policy_sequences_naive",
        SAMPLES,
        loss=part(f"{LOSSES}:PolicyGradient", per="sequence"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    grouped(
        "policy_constant",
        equivalent(ADDS_UP),
        loss=part(f"{LOSSES}:PolicyGradient", per="constant"),
        accumulation_steps=FEW,
    ),
    grouped(
        "policy_constant_naive",
        SAMPLES,
        loss=part(f"{LOSSES}:PolicyGradient", per="constant"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    Workload(
        "advantages_of_the_micro_batch",
        divergent(
            "EQ202", source="standardised over other rows: Engstrom et al., arXiv 2005.12729"
        ),
        **loop(f"{MUTANTS}/eq202_standardised_advantages.py"),
        accumulation_steps=FEW,
    ),
    row(
        "info_nce",
        divergent("EQ202", source=COUPLED),
        build=part("../fixtures/models/towers.py:Towers"),
        batches=VIEWS,
        loss=part(f"{LOSSES}:Contrastive"),
        accumulation_steps=(2, 4, 8),
        claims=("C26",),
    ),
    row(
        "clip",
        divergent("EQ202", source="Radford et al., arXiv 2103.00020: symmetric InfoNCE"),
        build=part("../fixtures/models/towers.py:Towers"),
        batches=VIEWS,
        loss=part(f"{LOSSES}:Contrastive", both=True),
        accumulation_steps=(2, 4, 8),
        claims=("C26",),
    ),
    row(
        "info_nce_naive",
        divergent("EQ202", source=UNWEIGHTED),
        build=part("../fixtures/models/towers.py:Towers"),
        batches=VIEWS,
        loss=part(f"{LOSSES}:Contrastive"),
        train=NAIVE,
        accumulation_steps=FEW,
        claims=("C26",),
    ),
    row(
        "clip_naive",
        divergent("EQ202", source=UNWEIGHTED),
        build=part("../fixtures/models/towers.py:Towers"),
        batches=VIEWS,
        loss=part(f"{LOSSES}:Contrastive", both=True),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    row(
        "mined_triplets",
        divergent("EQ202", source=MINED),
        loss=part(f"{LOSSES}:MinedTriplets"),
        accumulation_steps=FEW,
    ),
    row(
        "mined_triplets_naive",
        divergent("EQ202", source=UNWEIGHTED),
        loss=part(f"{LOSSES}:MinedTriplets"),
        train=NAIVE,
        accumulation_steps=FEW,
    ),
    Workload(
        "expert_balance",
        divergent("EQ202", source="Fedus et al., arXiv 2101.03961: a product of batch means"),
        **loop(f"{MUTANTS}/eq202_expert_balance.py"),
        accumulation_steps=FEW,
    ),
    Workload("experts", equivalent(ADDS_UP), **loop("../fixtures/trainers/moe_aux.py")),
    Workload(
        "experts_undivided",
        divergent("EQ106", source="the side term is not divided as the main one"),
        **loop(f"{MUTANTS}/eq106_auxiliary_loss_undivided.py"),
        accumulation_steps=FEW,
    ),
    Workload(
        "missing_division",
        divergent("EQ101", source="K means are summed instead of averaged"),
        **loop(f"{MUTANTS}/eq101_missing_division_plain.py"),
        splits=("even",),
        claims=("C3",),
    ),
    Workload(
        "sum_of_means",
        divergent(
            "EQ101", source="K means are summed: each token counts by its own micro-batch's mean"
        ),
        **loop(f"{MUTANTS}/eq101_missing_division_ragged.py"),
        accumulation_steps=FEW,
        claims=("C15",),
    ),
]
