"""EQ3xx: something happens at the wrong moment of the cycle, or the wrong number of times."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ301",
        name="zero-grad-in-cycle",
        summary="only the last micro-batch of each cycle counts",
        because="the gradients are zeroed before every backward instead of after every optimizer "
        "step",
        mathematics="""\
w = (0, ..., 0, w_K)
A = w_K p_K: about G / K for a divided loss, in another direction.""",
        detected="the timeline has a zero_grad between two backwards of a cycle, with zero "
        "weights before it",
        proved="with the zero_grad deferred to the end of the cycle the gradient is the full "
        "batch's",
        fix="call optimizer.zero_grad() once, right after optimizer.step()",
        seen_in_the_wild=(
            "pytorch/torchtitan#3575",
            "meituan-longcat/LongCat-Image#46",
            "bytetriper/RAE#67",
        ),
    ),
    Cause(
        code="EQ302",
        name="stale-gradients",
        summary="each step still contains the gradients of the steps before",
        because="nothing zeroes the gradients after the optimizer step",
        mathematics="""\
step t uses G_t + G_(t-1) + ... + G_0
The full batch run does the same, so the two agree: the fault is shared.""",
        detected="gradients are not zero when a cycle begins, in the reference run too",
        proved="with the gradients zeroed after each step the reference run changes",
        fix="optimizer.zero_grad() after optimizer.step()",
        seen_in_the_wild=("huggingface/transformers#340", "deepspeedai/DeepSpeed#7837"),
    ),
    Cause(
        code="EQ303",
        name="step-in-cycle",
        summary="the optimizer steps more often than once per cycle",
        because="optimizer.step() is not guarded by the end of the cycle",
        mathematics="""\
K updates with the gradients of B/K samples each, instead of one with B;
micro-batch k is evaluated at parameters that k-1 has already moved.""",
        detected="the timeline has an optimizer step between two backwards of a cycle",
        proved="with the steps inside the cycle deferred to its end the update is the full batch's",
        fix="if (micro_step + 1) % accumulation_steps == 0: optimizer.step()",
        seen_in_the_wild=(
            "huggingface/accelerate#2790",
            "huggingface/trl#220",
            "open-mmlab/mmdetection#11232",
        ),
    ),
    Cause(
        code="EQ304",
        name="dropped-tail",
        summary="the last, incomplete cycle never reaches the optimizer",
        because="the step happens at multiples of K only, and the number of micro-batches is not "
        "one",
        mathematics="""\
with m = (number of micro-batches) mod K > 0 left over:
one optimizer step fewer than full batches,
the last m micro-batches without effect.""",
        detected="backwards after the last optimizer step, and one step fewer than in the "
        "reference run",
        proved="with a step after the last backward the parameters are the full batch's",
        fix="step at the end of the data too: if last_of_cycle or last_of_epoch: optimizer.step()",
        seen_in_the_wild=(
            "Lightning-AI/pytorch-lightning#2853",
            "NVIDIA-NeMo/Automodel#2257",
            "ml-explore/mlx-lm#1544",
        ),
    ),
    Cause(
        code="EQ305",
        name="lost-micro-batch",
        summary="one micro-batch of the cycle has no effect",
        because="its contribution is overwritten, skipped or never reduced",
        mathematics="""\
w_j = 0 for exactly one j, w_k = v_k for the others
A = G - v_j p_j.""",
        detected="one weight is zero and the others are right, without a zero_grad that explains "
        "it",
        proved="adding that micro-batch's piece with its weight v_j brings the gradient back",
        fix="run backward for every micro-batch, and let .grad accumulate instead of assigning it",
        seen_in_the_wild=("deepspeedai/DeepSpeed#7981", "deepspeedai/DeepSpeed#6550"),
    ),
    Cause(
        code="EQ306",
        name="clip-per-micro-batch",
        summary="gradients are clipped after every backward instead of once per cycle",
        because="clipping a partial sum shrinks what is already there, and again at the next "
        "micro-batch",
        mathematics="""\
s_k = min(1, max_norm / |A_k|), A_k = s_k (A_(k-1) + w_k p_k)
Early micro-batches are multiplied by every later s: the last ones dominate.""",
        detected="more clips than optimizer steps, and weights that grow towards the end of the "
        "cycle",
        proved="with every clip but the last dropped the gradient is the full batch's",
        fix="clip once, between the last backward and optimizer.step()",
        seen_in_the_wild=("huggingface/diffusers#686", "Modalities/modalities#118"),
    ),
    Cause(
        code="EQ307",
        name="scheduler-per-micro-batch",
        summary="the learning rate runs ahead, K times as fast",
        because="scheduler.step() is called per micro-batch instead of per optimizer step",
        mathematics="""\
optimizer step t uses lr(K t) instead of lr(t)
A cosine over 1000 updates is through after 1000/K. Gradients are right.""",
        detected="learning rates differ, and the timeline has K scheduler steps per optimizer step",
        proved="with the scheduler steps inside the cycle dropped the learning rates are the full "
        "batch's",
        fix="call scheduler.step() right after optimizer.step(), inside the same if",
        seen_in_the_wild=(
            "Lightning-AI/pytorch-lightning#1476",
            "Lightning-AI/litgpt#926",
            "Lightning-AI/pytorch-lightning#832",
        ),
    ),
    Cause(
        code="EQ308",
        name="scheduler-horizon",
        summary="the schedule was built for another number of optimizer steps",
        because="its length or warm-up is counted in micro-batches, or rounded down",
        mathematics="""\
lr(t; T') instead of lr(t; T), with T' = K T, T / K or floor instead of ceil
One call per optimizer step: the calls are right, the length is not.""",
        detected="learning rates differ although scheduler and optimizer steps go together",
        proved="with the schedule built for the reference's number of steps the learning rates "
        "agree",
        fix="total_steps = math.ceil(len(loader) / accumulation_steps) * epochs",
        seen_in_the_wild=(
            "huggingface/diffusers#4387",
            "huggingface/diffusers#3983",
            "NVIDIA-NeMo/Automodel#2257",
        ),
    ),
    Cause(
        code="EQ309",
        name="state-per-micro-batch",
        summary="a running average, teacher, metric or iterated vector advances with every "
        "micro-batch",
        because="its update sits in the forward or in the inner loop instead of after "
        "optimizer.step()",
        mathematics="""\
EMA: s <- d s + (1 - d) theta, K times per optimizer step: the decay is d^K
Spectral norm: K power iterations per step. Gradients may be right.""",
        detected="buffers or other state advance K times per optimizer step",
        proved="with the updates inside the cycle dropped the state is the full batch's",
        fix="update the average right after optimizer.step(), inside the same if",
        seen_in_the_wild=("SWivid/F5-TTS#631",),
    ),
    Cause(
        code="EQ310",
        name="tail-leak",
        summary="the leftover micro-batches of one epoch join the first cycle of the next",
        because="the counter or the gradients are carried over the border of the epoch",
        mathematics="""\
that step's gradient is the one of m micro-batches of the old epoch
and K - m of the new.
The samples of the step are not those of any full batch.""",
        detected="the samples consumed by one optimizer step straddle two full batches",
        proved="with a step forced at the border the updates are the full batch's",
        fix="step on the last micro-batch of an epoch, and zero the gradients there",
        seen_in_the_wild=("ultralytics/yolov5#464",),
    ),
    Cause(
        code="EQ311",
        name="cycle-length",
        summary="the number of micro-batches per optimizer step is not the one asked for",
        because="K is computed: a floor division, a forgotten number of nodes, a modulus off by "
        "one, or a setting that never arrives",
        mathematics="""\
K' != K: the effective batch is K'/K of the one asked for
The number of optimizer steps is that of K'.""",
        detected="cycles in the timeline are longer or shorter than accumulation_steps",
        proved="with the cycle length put right the samples and the update of every step agree",
        fix="if (micro_step + 1) % accumulation_steps == 0, with micro_step counted from 0",
        seen_in_the_wild=(
            "Lightning-AI/litgpt#1947",
            "huggingface/diffusers#308",
            "huggingface/accelerate#3630",
            "AnswerDotAI/fsdp_qlora#6",
        ),
    ),
    Cause(
        code="EQ312",
        name="optimizer-state-per-micro-batch",
        summary="weight decay, moments or the step count advance with every micro-batch",
        because="a part of the optimizer's work is done in the inner loop",
        mathematics="""\
theta <- (1 - lr c) theta, K times per optimizer step: decay (1 - lr c)^K
or beta^K for a moment. The gradient is right, the update is not.""",
        detected="gradients agree, and parameters or optimizer state do not",
        proved="with the updates inside the cycle dropped the parameters are the full batch's",
        fix="leave decay, moments and counters to optimizer.step()",
    ),
    Cause(
        code="EQ313",
        name="learning-rate-scale",
        summary="the learning rate is multiplied by K or the number of ranks, and the batch is no larger",
        because="the rate follows a number of micro-batches or ranks that the effective batch size does not follow",
        mathematics="""\
lr' = c lr in every optimizer step, c = K, R, K R, their roots or inverses
The linear rule lr ~ K R b, with b samples in each of K R micro-batches, is
lr ~ N: the same however the batch is cut. Without b it is not.""",
        detected="all learning rates are one multiple of the full batch's, a power of K or of the number of ranks",
        proved="with the rates divided by that factor the parameters are the full batch's",
        fix="lr = base_lr * (micro_batch_size * accumulation_steps * world_size) / base_batch_size",
    ),
)
