"""The router's balancing loss of Mixtral under Trainer: K = 1 against K = 4 micro-batches that hold the same rows.

    pip install transformers accelerate && python transformers_router_loss_per_micro_batch.py

The eight samples are two rows, four times over: every micro-batch of two has the token and expert shares of the full
batch, so that the balancing loss is the same number in each, and its coupling of rows plays no part. One optimizer step,
float64, no dropout, the gradient of the router taken before the step.
"""

import tempfile

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
ROWS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
TABLE = [{"input_ids": row, "labels": row} for row in ROWS]


class Gradient(TrainerCallback):
    """Keeps the routers' gradient that the step is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flat = torch.cat(
            [p.grad.flatten() for n, p in model.named_parameters() if "gate.weight" in n]
        )


def gradient(coefficient, accumulation_steps):
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, output_router_logits=coefficient > 0, router_aux_loss_coef=coefficient
    )
    config._experts_implementation = "eager"
    model = MixtralForCausalLM(config).double()
    keeper = Gradient()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8 // accumulation_steps,
            gradient_accumulation_steps=accumulation_steps,
            max_steps=1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        Trainer(model, arguments, train_dataset=TABLE, callbacks=[keeper]).train()
    return keeper.flat


if __name__ == "__main__":
    plain = {k: gradient(0.0, k) for k in (1, 2, 4)}
    print(
        f"without it, |K=4 - K=1| / |K=1|: {float((plain[4] - plain[1]).norm() / plain[1].norm()):.1e}"
    )
    for coefficient in (0.001, 0.02, 1.0):
        share = {k: gradient(coefficient, k) - plain[k] for k in (1, 2, 4)}
        for k in (2, 4):
            ratio = float(share[k] @ share[1] / (share[1] @ share[1]))
            print(
                f"coefficient {coefficient}: the balancing loss counts {ratio:.6f} times at K = {k}"
            )
