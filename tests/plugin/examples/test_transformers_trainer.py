"""Guard transformers.Trainer: the framework's own loop under the fixture, with rows of very unequal length."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="this example needs transformers and accelerate, which are not installed"
)

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # those of the framework on a machine without a GPU


def build():
    """Return a tiny Llama."""
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def batches():
    """Return two full batches of eight rows with 2 to 9 valid tokens."""
    found = []
    for _ in range(2):
        tokens = torch.randint(1, 32, (8, 10))
        lengths = torch.arange(2, 10)[:, None]
        labels = torch.where(torch.arange(10)[None] < lengths, tokens, -100)
        found.append(
            {"input_ids": tokens, "attention_mask": (labels >= 0).long(), "labels": labels}
        )
    return found


def train(model, dataset, accumulation_steps, micro_batch_size, optimizer_steps):
    """Let the Trainer take the samples in order, one optimizer step for each full batch."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation_steps,
            max_steps=optimizer_steps,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            train_sampling_strategy="sequential",
        )
        transformers.Trainer(model=model, args=arguments, train_dataset=dataset).train()


def test_trainer_is_equivalent(equivcheck):
    equivcheck(build=build, batches=batches, train=train, accumulation_steps=[2, 4])
