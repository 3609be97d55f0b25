"""EQ1xx: the micro-batches are there, and are weighted wrongly."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ101",
        name="missing-division",
        summary="the gradient is K times the full batch's",
        because="each micro-batch's loss is already a mean, and the K means are summed instead of "
        "averaged",
        mathematics="""\
v_k = 1/K    w_k = 1
A = K G:  scale = K, cosine = 1.
Adam hides the factor; SGD, weight decay and clipping do not.""",
        detected="all weights are K times the full batch's, or all are 1",
        proved="multiplying each backward by v_k / 1 brings the gradient back to the full batch's",
        fix="(loss / accumulation_steps).backward()",
        seen_in_the_wild=(
            "karpathy/nanoGPT#168",
            "huggingface/trl#2647",
            "verl-project/verl#3332",
            "pytorch/torchtitan#4194",
        ),
    ),
    Cause(
        code="EQ102",
        name="double-division",
        summary="the gradient is the full batch's divided by K",
        because="two layers of the stack, often a script and its framework, each divide by "
        "accumulation_steps",
        mathematics="""\
v_k = 1/K    w_k = 1/K^2
A = G / K:  scale = 1/K, cosine = 1; the logged loss is often right.""",
        detected="all weights are the full batch's divided by K",
        proved="multiplying each backward by K brings the gradient back to the full batch's",
        fix="divide in one place only: loss.backward() where the framework divides already",
        seen_in_the_wild=(
            "huggingface/accelerate#3533",
            "Lightning-AI/pytorch-lightning#9769",
            "unslothai/unsloth#3598",
        ),
    ),
    Cause(
        code="EQ103",
        name="mean-of-means",
        summary="every micro-batch counts the same although they hold different numbers of tokens "
        "or samples",
        because="the loss is a mean within each micro-batch, and a mean of means is the mean over "
        "all only if the counts are equal",
        mathematics="""\
v_k = n_k / N    w_k = 1/K
A = sum p_k / K  and  G = sum (n_k / N) p_k:  equal only for equal n_k.
Tokens in short micro-batches count for more than tokens in long ones.""",
        detected="the candidate's weights are all alike, the full batch's follow the counts",
        proved="multiplying each backward by v_k K brings the gradient back to the full batch's",
        fix="sum the loss in each micro-batch and divide by the count of the whole cycle: "
        "(loss_sum / total_tokens).backward()",
        seen_in_the_wild=(
            "unslothai/unsloth#1134",
            "huggingface/transformers#34191",
            "pytorch/torchtune#1875",
            "axolotl-ai-cloud/axolotl#1980",
            "ml-explore/mlx-lm#1413",
        ),
    ),
    Cause(
        code="EQ104",
        name="wrong-denominator",
        summary="the loss is divided by a count of the wrong things",
        because="the divisor counts other tokens or samples than the loss sums: padding, prompt, "
        "shifted or truncated ones",
        mathematics="""\
w_k = v_k N / M    for a count M that is not N
A = (N / M) G:  scale is a ratio p/q of whole numbers, cosine = 1.""",
        detected="the scale is a ratio of two counts within noise, and not a power of K",
        proved="the counting rule read from one K predicts the scale at another K exactly",
        fix="count what the loss counts: total = (labels != ignore_index).sum() over the whole "
        "cycle",
        seen_in_the_wild=(
            "huggingface/transformers#35438",
            "huggingface/transformers#46903",
            "huggingface/trl#6439",
            "OpenNMT/OpenNMT-py#526",
        ),
    ),
    Cause(
        code="EQ105",
        name="wrong-tail-divisor",
        summary="the incomplete last cycle is divided by K instead of its own length",
        because="the last cycle holds m < K micro-batches, and its loss is still divided by "
        "accumulation_steps",
        mathematics="""\
v_k = 1/m    w_k = 1/K    in the tail only
A = (m/K) G there:  scale = m/K, cosine = 1; every other step is right.""",
        detected="the divergence is confined to the last, shorter cycle, with the scale m/K",
        proved="multiplying the tail's backwards by K/m brings its gradient back to the full "
        "batch's",
        fix="(loss / micro_batches_in_this_cycle).backward()",
        seen_in_the_wild=(
            "modelscope/ms-swift#10084",
            "hiyouga/LLaMA-Factory#10705",
            "jingyaogong/minimind#749",
            "open-mmlab/mmcv#784",
        ),
    ),
    Cause(
        code="EQ106",
        name="auxiliary-loss-scale",
        summary="a side term of the loss is scaled differently from the main one",
        because="the auxiliary loss (router balance, z-loss, second head) is added after the "
        "division, or multiplied by a factor of its own",
        mathematics="""\
loss = main + c * auxiliary
w_k = v_k for main, and s v_k for auxiliary with s != 1
A - G = (s - 1) c * sum v_k (gradient of auxiliary in k),
zero for the parameters that the term does not reach.""",
        detected="fitted per addend of the loss, one addend has other weights than the rest",
        proved="scaling that addend's gradient alone brings the whole gradient back",
        fix="((loss + coefficient * auxiliary) / accumulation_steps).backward()",
        seen_in_the_wild=(
            "NVIDIA/Megatron-LM#2237",
            "NVIDIA/Megatron-LM#4070",
            "NVIDIA-NeMo/Automodel#3359",
            "modelscope/ms-swift#5823",
        ),
    ),
    Cause(
        code="EQ107",
        name="regulariser-per-micro-batch",
        summary="a penalty on the weights is added K times",
        because="the penalty does not depend on the data, and every micro-batch adds the whole of "
        "it",
        mathematics="""\
A = G + (K - 1) * gradient of the penalty
For an L2 penalty c |theta|^2 / 2 the difference is (K - 1) c theta,
parallel to the parameters.""",
        detected="one addend of the loss has the same gradient in every micro-batch, and is not "
        "divided by K",
        proved="with that addend divided by K the gradient is the full batch's",
        fix="add the penalty once per cycle, or divide it as well: ((loss + penalty) / "
        "accumulation_steps).backward()",
        seen_in_the_wild=("keras-team/keras#20609", "keras-team/keras#20610"),
    ),
    Cause(
        code="EQ108",
        name="sum-reduction",
        summary="a sum over samples is divided by K as if it were a mean",
        because="the loss sums over its samples, so the sum over micro-batches is already the "
        "full batch's, and dividing by accumulation_steps shrinks it",
        mathematics="""\
v_k = 1    w_k = 1/K
A = G / K:  scale = 1/K, cosine = 1, in the logged loss too.""",
        detected="the full batch's weights are all 1: the loss is a sum; the candidate's are 1/K",
        proved="multiplying each backward by K brings gradient and loss back to the full batch's",
        fix="loss.backward() for a sum, or reduction='mean' together with the division",
    ),
    Cause(
        code="EQ109",
        name="repeated-rescale",
        summary="earlier micro-batches are scaled again at every later one",
        because="the accumulated .grad itself is rescaled within the cycle, instead of the new "
        "contribution",
        mathematics="""\
w_k = c^(K-k) v'_k    for k = 1..K: a geometric sequence
The first micro-batch fades (c < 1) or grows (c > 1) as the cycle goes on.""",
        detected="the ratios of neighbouring weights are one constant other than the full batch's",
        proved="multiplying each backward by v_k over the predicted power brings the gradient back",
        fix="scale the loss, never .grad: (loss / accumulation_steps).backward()",
    ),
    Cause(
        code="EQ110",
        name="wrong-objective",
        summary="both runs agree with each other, and not with the objective stated",
        because="the fault does not depend on accumulation, so only an independent statement of "
        "the loss sees it",
        mathematics="""\
A = G, and G differs from the gradient H of objective(model, full batch).
The scale of G against H names the factor, if it is one.""",
        detected="the reference run's gradient differs from that of the subject's own objective",
        proved="the objective, evaluated in place of the loss in the reference run, gives another "
        "gradient",
        fix="make train and objective state the same loss; a factor points at the divisor",
        seen_in_the_wild=("huggingface/transformers#46903", "deepspeedai/DeepSpeed#7837"),
    ),
)
