"""EQ7xx: what is shown differs from what is trained."""

from __future__ import annotations

from equivcheck.causes._cause import Cause

CAUSES = (
    Cause(
        code="EQ701",
        name="logged-loss",
        summary="the loss shown is not the loss that is trained on",
        because="the number is the last micro-batch's, a sum of the divided ones, or divided once "
        "too often",
        mathematics="""\
right:  L = sum v_k loss_k
seen:   loss_K (the last), sum loss_k (K times too large), L / K
The gradient is judged separately: either can be right on its own.""",
        detected="the logged loss differs from the full batch's, while the gradients agree, or in "
        "another ratio than they do",
        proved="the recorded losses of the backwards, combined with the right weights, give the "
        "full batch's loss",
        fix="logged += loss.detach() for losses already divided by the whole cycle's count",
        seen_in_the_wild=(
            "huggingface/transformers#527",
            "deepspeedai/DeepSpeed#3428",
            "Lightning-AI/pytorch-lightning#13243",
            "Modalities/modalities#118",
            "pytorch/torchtitan#4194",
        ),
    ),
)
