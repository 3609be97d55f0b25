"""EQ4xx: low precision and the loss scale."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ401",
        name="low-precision-accumulation",
        summary="adding K micro-batches in a low precision loses more than the precision of one",
        because="the sum is kept in bfloat16 or float16, and every addition rounds it again",
        mathematics="""\
u = unit roundoff (bfloat16 2^-8, float16 2^-11, float32 2^-24)
|error| <= (K - 1) u * sum |w_k p_k|, typically sqrt(K) u;
small late pieces vanish altogether.""",
        detected="the native sum is further from the same pieces added in float64 than K "
        "roundings of the parameters' dtype allow",
        proved="with the accumulation widened to float64 the loss is gone",
        fix="accumulate in float32: keep float32 parameters under autocast, or a float32 buffer",
        seen_in_the_wild=("google-deepmind/optax#1567",),
    ),
    Cause(
        code="EQ402",
        name="scaler-update-in-cycle",
        summary="the loss scale changes between micro-batches that are added",
        because="scaler.update() runs per micro-batch, so gradients of different scales are "
        "summed and unscaled by the last one",
        mathematics="""\
A = sum (S_k / S_K) v_k p_k:
each weight is multiplied by its own loss scale over the last one.
Invisible until the scale changes.""",
        detected="the backwards of one cycle carried different loss scales",
        proved="multiplying each backward by S_K / S_k brings the gradient back to the full "
        "batch's",
        fix="call scaler.update() once per cycle, right after scaler.step(optimizer)",
        seen_in_the_wild=("lucidrains/e2-tts-pytorch#24",),
    ),
    Cause(
        code="EQ403",
        name="unscale-per-micro-batch",
        summary="earlier micro-batches are divided by the loss scale more than once",
        because="scaler.unscale_() divides the whole accumulated gradient, and it runs within the "
        "cycle",
        mathematics="""\
w_k = v_k / S^(K-k), S the loss scale: one division per later micro-batch
With S = 65536 only the last micro-batch is left.""",
        detected="more unscales than optimizer steps, and weights that fall by powers of the loss "
        "scale",
        proved="with every unscale but the last dropped the gradient is the full batch's",
        fix="call scaler.unscale_(optimizer) once, after the last backward of the cycle",
        seen_in_the_wild=("lucidrains/e2-tts-pytorch#24",),
    ),
    Cause(
        code="EQ404",
        name="skipped-step",
        summary="an optimizer step is skipped because the scaled gradients overflow",
        because="the loss scale is too large for float16, and the scaler skips the step as it "
        "should; all K micro-batches are lost",
        mathematics="""\
S |p_k| > 65504 for one element of one micro-batch is enough
The parameters do not move, the samples are consumed.""",
        detected="an optimizer step of the native runs did not happen, with inf or nan in the "
        "gradients",
        proved="with a smaller loss scale the step happens",
        fix="torch.amp.GradScaler(init_scale=2.0 ** 10), or bfloat16, which needs no scaler",
    ),
    Cause(
        code="EQ405",
        name="clip-before-unscale",
        summary="gradients are clipped while still multiplied by the loss scale",
        because="the clip runs before scaler.unscale_(), so the threshold is smaller by the loss "
        "scale",
        mathematics="""\
S G is clipped to max_norm, then divided: the norm is at most max_norm / S
The full batch run does the same, so the two can agree: the fault is shared.""",
        detected="a clip in the timeline while the gradients still carry a loss scale other than 1, "
        "or gradients divided after it by what the loop multiplied its loss with",
        proved="with the clip deferred behind the unscale the reference run changes",
        fix="scaler.unscale_(optimizer) before clip_grad_norm_",
        seen_in_the_wild=("Lightning-AI/pytorch-lightning#4441",),
    ),
)
