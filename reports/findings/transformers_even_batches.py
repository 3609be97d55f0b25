"""Which rows Trainer hands to each of two processes where they do not come out even: no finding, a design to know.

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc-per-node 2 transformers_even_batches.py

20 rows in order, 4 to a micro-batch, 2 micro-batches to an update, 2 processes: the last update has 4 rows of its own.
"""

import os
import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class Seeing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(1, 1), []

    def forward(self, x, labels=None):
        self.seen.append([int(value) for value in x.flatten()])
        return {"loss": (self.linear(x) - labels).pow(2).mean()}


class InOrder(Trainer):
    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


rows = [{"x": torch.tensor([float(n)]), "labels": torch.tensor([0.0])} for n in range(20)]
model = Seeing()
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows)
    trainer.train()
print(f"rank {os.environ.get('RANK', '0')}: {model.seen}, {trainer.state.global_step} updates")
