"""EQ2xx: samples of one batch see each other, so a smaller batch is another function."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ201",
        name="batch-statistics",
        summary="a layer normalises over the batch, and a micro-batch has other statistics",
        because="batch normalisation in training mode computes mean and variance over the rows it "
        "is given",
        mathematics="""\
y_i = (x_i - mean(x)) / std(x),
over the B rows of the full batch or the B/K of a micro-batch
G is not in the span of the p_k at all: no weights can repair it.""",
        detected="the full batch's gradient is outside the span of the pieces, and a module's "
        "output for one sample depends on the other samples",
        proved="with the statistics of the full batch frozen in both runs the gradients agree",
        fix="replace it by GroupNorm, LayerNorm or RMSNorm, keep it in eval mode, or accept it: "
        "--expect EQ201",
        seen_in_the_wild=("NVIDIA/DeepLearningExamples#625", "open-mmlab/mmcv#1869"),
    ),
    Cause(
        code="EQ202",
        name="batch-coupled-loss",
        summary="the loss of a sample depends on which other samples are in its batch",
        because="in-batch negatives, router balance or normalised advantages see B/K rows instead "
        "of B",
        mathematics="""\
loss = f(z_1, ..., z_B) is not a sum of functions of single rows
d loss_i / d x_j is not zero for i != j; G is not in the span of the p_k.""",
        detected="the full batch's gradient is outside the span of the pieces, and every module "
        "treats its samples separately",
        proved="perturbing one row changes another row's loss term, and the candidate has the "
        "right weights on its own pieces",
        fix="gather the rows first (GradCache: two passes, the second per micro-batch), or accept "
        "it: --expect EQ202",
        seen_in_the_wild=(
            "luyug/GradCache#7",
            "huggingface/sentence-transformers#3612",
            "NVIDIA/Megatron-LM#5798",
            "huggingface/transformers#47394",
        ),
    ),
    Cause(
        code="EQ203",
        name="running-statistics",
        summary="running buffers differ although the gradients agree",
        because="a running average is updated once per forward, so K times per optimizer step "
        "with the momentum meant for one",
        mathematics="""\
full batch:   m <- (1 - a) m + a x          one update per optimizer step
accumulated:  m <- (1 - a)^K m + ...      K updates per optimizer step
num_batches_tracked grows K times as fast.""",
        detected="buffers differ beyond noise and are not what K updates of the stated momentum "
        "give, or the gradients agree",
        proved="with the buffers updated once per cycle they are the full batch's",
        fix="momentum = 1 - (1 - momentum) ** (1 / accumulation_steps), or update them once per "
        "cycle",
        seen_in_the_wild=("open-mmlab/mmcv#1869",),
    ),
)
