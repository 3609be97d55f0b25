"""Lightning's accumulate_grad_batches at the end of an epoch: 5 batches of 4 rows, four to a step, so one is left over.

    pip install lightning && python lightning_incomplete_cycle.py

The update of the last step against the gradient of its own four rows; SGD, float64, the same rows in the same order.
"""

import logging
import warnings

import lightning
import torch

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
generator = torch.Generator().manual_seed(0)
X = torch.randn(20, 3, generator=generator, dtype=torch.float64)
Y = torch.randn(20, 1, generator=generator, dtype=torch.float64)
RATE = 0.1


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1).double()
        self.path = []

    def training_step(self, batch, _):
        return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)

    def on_before_zero_grad(self, _):
        self.path.append(self.layer.weight.detach().clone())


def updates(accumulate):
    data = torch.utils.data.TensorDataset(X, Y)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    module = Module()
    first = module.layer.weight.detach().clone()
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)
    return first, module


first, module = updates(4)
seen = [first, *module.path, module.layer.weight.detach()]
before = next(w for w in reversed(seen) if not torch.equal(w, seen[-1]))
moved = seen[-1] - before
fresh = Module()
# The state before the last step: its bias is what the same first step of 16 rows gives.
torch.nn.functional.mse_loss(fresh.layer(X[:16]), Y[:16]).backward()
with torch.no_grad():
    for p in fresh.parameters():
        p -= RATE * p.grad
        p.grad = None
print(
    f"step over 16 rows as 4 x 4, |accumulated - full batch|: {float((before - fresh.layer.weight).norm()):.1e}"
)
torch.nn.functional.mse_loss(fresh.layer(X[16:]), Y[16:]).backward()
ratio = float(
    (moved * -RATE * fresh.layer.weight.grad).sum()
    / (RATE * fresh.layer.weight.grad).square().sum()
)
print(f"step over the 4 rows that are left, accumulated over full batch: {ratio:.12f}")
