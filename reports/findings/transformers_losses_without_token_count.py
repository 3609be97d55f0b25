"""Gradients of heads whose loss ignores num_items_in_batch, K = 1 against K = 4 over the same eight samples.

    pip install transformers accelerate datasets && python transformers_losses_without_token_count.py

One optimizer step of Trainer over eight samples, as one batch of eight and as four of two: same samples, same order, no
dropout, float64. A gradient is taken by a callback just before the step (no clipping), so no log is trusted.
"""

import tempfile

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": 0}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "dropout": 0.0}
BART |= {
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "dropout_rate": 0.0,
}
T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0}

generator = torch.Generator().manual_seed(0)
INPUTS = torch.randint(10, 64, (8, 12), generator=generator)
TOKENS = torch.randint(0, 3, (8, 12), generator=generator)
CLASSES = torch.randint(0, 3, (8,), generator=generator)


class Table(torch.utils.data.Dataset):
    """Eight samples."""

    def __init__(self, labels, **columns):
        self.columns = {"labels": labels, **columns}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.columns.items()}


class Gradient(TrainerCallback):
    """Keeps the gradient that the first optimizer step is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def gradient(make, table, accumulation_steps):
    torch.manual_seed(0)
    model = make().double()
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
        )
        trainer = Trainer(model, arguments, train_dataset=table, callbacks=[keeper])
        trainer.train()
        logged = next(e for e in trainer.state.log_history if "train_loss" in e)["train_loss"]
    return keeper.flat, logged


def bert(cls, **fields):
    return lambda: cls(BertConfig(**BERT, **NO_DROPOUT, **fields))


words = Table(INPUTS, input_ids=INPUTS)
classes = Table(CLASSES, input_ids=INPUTS)
numbers = Table(torch.randn(8, generator=generator, dtype=torch.float64), input_ids=INPUTS)
several = Table(torch.eye(3, dtype=torch.float64)[CLASSES], input_ids=INPUTS)
pairs = Table(CLASSES.clamp(max=1), input_ids=torch.stack([INPUTS, INPUTS.flip(0)], 1))
HEADS = {
    "BertForSequenceClassification": (bert(BertForSequenceClassification, num_labels=3), classes),
    "BertForTokenClassification": (
        bert(BertForTokenClassification, num_labels=3),
        Table(TOKENS, input_ids=INPUTS),
    ),
    "BertForMaskedLM": (bert(BertForMaskedLM), words),
    "BertForMultipleChoice": (bert(BertForMultipleChoice), pairs),
    "BartForConditionalGeneration": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        words,
    ),
    "T5ForConditionalGeneration": (lambda: T5ForConditionalGeneration(T5Config(**T5)), words),
    "LlamaForSequenceClassification, single label": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=3)),
        classes,
    ),
    "LlamaForSequenceClassification, regression": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1)),
        numbers,
    ),
    "LlamaForSequenceClassification, multi-label": (
        lambda: LlamaForSequenceClassification(
            LlamaConfig(**LLAMA, num_labels=3, problem_type="multi_label_classification")
        ),
        several,
    ),
    "LlamaForCausalLM (right)": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), words),
}

if __name__ == "__main__":
    print(
        f"{'head':46} {'|g accumulated| / |g full|':28} {'cosine':>12}   loss full -> accumulated"
    )
    for name, (make, table) in HEADS.items():
        full, loss = gradient(make, table, 1)
        accumulated, other = gradient(make, table, 4)
        ratio = float(accumulated.norm() / full.norm())
        cosine = float(accumulated @ full / (accumulated.norm() * full.norm()))
        print(f"{name:46} {ratio:<28.12f} {cosine:12.10f}   {loss:.4f} -> {other:.4f}")
