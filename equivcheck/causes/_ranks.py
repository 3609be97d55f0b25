"""EQ5xx: several ranks share a batch. R = number of ranks, r a rank."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ501",
        name="mean-of-ranks",
        summary="every rank counts the same although they hold different numbers of tokens or "
        "samples",
        because="each rank divides by its own count, and the all-reduce averages the ranks",
        mathematics="""\
v_(r,k) = n_(r,k) / N    w_(r,k) = n_(r,k) / (R n_r)
Equal only if every rank counts the same; invisible with one rank.""",
        detected="within a rank the weights follow the counts, between ranks they do not",
        proved="reducing once with the count of all ranks brings the gradient back",
        fix="all-reduce the count, then (loss_sum * world_size / total_tokens).backward() under "
        "DDP",
        seen_in_the_wild=(
            "huggingface/trl#3538",
            "pytorch/torchtitan#1842",
            "huggingface/transformers#37474",
        ),
    ),
    Cause(
        code="EQ502",
        name="missing-synchronisation",
        summary="the ranks step with different gradients",
        because="the last micro-batch of the cycle runs without a reduction, or a parameter "
        "misses it",
        mathematics="""\
rank r steps with A_r = sum_k w_k p_(r,k):
the weights of all other ranks are zero.
The parameters part, and stay apart.""",
        detected="gradients differ between ranks at the optimizer step; foreign weights are zero",
        proved="reducing once at the end of the cycle brings the gradient back on every rank",
        fix="leave no_sync() before the last micro-batch's forward",
        seen_in_the_wild=("Lightning-AI/pytorch-lightning#9122",),
    ),
    Cause(
        code="EQ503",
        name="redundant-synchronisation",
        summary="every micro-batch is reduced, where one reduction per cycle is enough",
        because="no_sync() is missing, or does not enclose the forward",
        mathematics="""\
The mean over ranks is linear, sum_k mean_r = mean_r sum_k:
the numbers are right.
K times the traffic. A warning, never a divergence.""",
        detected="K times as many collectives per cycle as parameters need",
        proved="reducing once at the end of the cycle gives the same gradient",
        fix="with model.no_sync(): forward and backward of all micro-batches but the last",
        seen_in_the_wild=(
            "huggingface/accelerate#3762",
            "facebookresearch/fairseq#2238",
            "verl-project/verl#3332",
        ),
    ),
    Cause(
        code="EQ504",
        name="rank-scale",
        summary="the gradient is off by the number of ranks, or of stages",
        because="the mean over ranks is taken twice or not at all, beside a loss already "
        "normalised globally",
        mathematics="""\
A = R G  or  A = G / R:  scale is a power of the world size, cosine = 1
It changes with the topology, not with K.""",
        detected="the scale is a power of the world size and does not change with K",
        proved="reducing once with the right denominator brings the gradient back",
        fix="under DDP, which averages, multiply a globally normalised loss by world_size",
        seen_in_the_wild=(
            "deepspeedai/DeepSpeed#5555",
            "deepspeedai/Megatron-DeepSpeed#42",
            "deepspeedai/DeepSpeed#8154",
        ),
    ),
    Cause(
        code="EQ505",
        name="rank-divergence",
        summary="the ranks hold different parameters although their gradients were equal",
        because="the ranks started from different parameters, or something that only some ranks do "
        "changes them",
        mathematics="theta_r != theta_s for ranks r, s that should be replicas.",
        detected="parameters differ between ranks before or after a step with equal gradients",
        proved="with the parameters broadcast from rank 0 the ranks stay together",
        fix="broadcast parameters and buffers from rank 0 after build",
    ),
    Cause(
        code="EQ506",
        name="clip-wrong-norm",
        summary="gradients are clipped by the norm of a part of them",
        because="the norm is that of one shard, one rank or one pipeline stage, not of the whole "
        "gradient",
        mathematics="""\
|G|^2 = sum of |part|^2:
the norm of a part is too small and the clip too weak.
Parts are clipped by different factors: the direction changes too.""",
        detected="the norm used by the clip is that of a part, and differs between ranks",
        proved="with the clip by the norm of the whole the update is the full batch's",
        fix="use the wrapper's own clip_grad_norm_, or total_norm over the full mesh",
        seen_in_the_wild=(
            "pytorch/pytorch#72548",
            "pytorch/torchtitan#649",
            "deepspeedai/DeepSpeed#7302",
        ),
    ),
    Cause(
        code="EQ507",
        name="scheduler-per-rank",
        summary="the learning rate runs ahead by the number of ranks",
        because="the scheduler is stepped once for every rank, or its length is divided by the "
        "world size",
        mathematics="optimizer step t uses lr(R t) instead of lr(t); right with one rank.",
        detected="learning rates differ by a factor of the world size in time",
        proved="with one scheduler step per optimizer step the learning rates agree",
        fix="step the scheduler once per optimizer step, or tell the wrapper so (split_batches)",
        seen_in_the_wild=("huggingface/diffusers#2632",),
    ),
    Cause(
        code="EQ508",
        name="unused-parameter",
        summary="a parameter used by some micro-batches or ranks only misses a part of its "
        "gradient",
        because="the reduction waits for, or skips, a gradient that this rank never made in its "
        "last backward",
        mathematics="""\
w_(r,k) = 0 for that parameter on the ranks that skipped it,
or None in place of a zero.
Under DDP the reduction is out of step, and every parameter can be wrong.""",
        detected="a gradient is None on one side and a tensor on the other, or fits per parameter "
        "differ",
        proved="with every parameter taking part in every backward the gradient is the full "
        "batch's",
        fix="DistributedDataParallel(model, find_unused_parameters=True)",
    ),
)
