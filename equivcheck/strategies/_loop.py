"""Correct training loops, composed of parts: every one accumulates as it should.

B rows, T tokens of a row, W width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from equivcheck.strategies._batches import FEATURES, VOCABULARY, Batches, Tokens, Values

# From the simplest to the strangest: a failing example shrinks towards the first of each.
LAYERS = (
    "linear",
    "tanh",
    "gelu",
    "relu",
    "layer_norm",
    "rms_norm",
    "group_norm",
    "frozen_batch_norm",
    "residual",
    "gated",
    "dropout",
    "convolution",
    "attention",
    "recurrent",
)
OPTIMIZERS = (
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "adamw",
    "amsgrad",
    "adagrad",
    "rmsprop",
    "adamax",
    "nadam",
    "radam",
    "adadelta",
    "rprop",
    "asgd",
)
SCHEDULES = ("none", "linear", "cosine", "step")
STYLES = ("divide", "share", "rescale")
PRECISIONS = ("float32", "float64", "autocast_bfloat16", "bfloat16")


@dataclass(frozen=True, repr=False)
class Loop:
    """A subject whose accumulation is right: `build`, `batches`, `train`; its repr is the call that makes it.

    Attributes:
        batches: Its full batches.
        layers: Names out of LAYERS, from the input to the head.
        optimizer: One of OPTIMIZERS.
        schedule: One of SCHEDULES; advances once per optimizer step.
        max_norm: Gradients are clipped to this norm before the step.
        precision: One of PRECISIONS: the parameters' dtype, or autocast over float32.
        style: How micro-batches are weighted: "divide" sums by the cycle's count, "share" means by their share of it,
            "rescale" the gradients once, at the step.
        scale: A factor on the loss.
    """

    batches: Batches
    layers: tuple[str, ...] = ()
    optimizer: str = "sgd"
    schedule: str = "none"
    max_norm: float | None = None
    precision: str = "float32"
    style: str = "divide"
    scale: float = 1.0

    def __repr__(self) -> str:
        """Return the call, with what differs from the plainest loop."""
        given = [repr(self.batches)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                given.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def build(self) -> nn.Module:
        """Return a fresh model."""
        model = Model(self)
        dtype = {"bfloat16": torch.bfloat16, "float64": torch.float64}.get(self.precision)
        return model if dtype is None else model.to(dtype)

    def train(self, model: nn.Module, loader: Any, accumulation_steps: int) -> list[float]:
        """Train, and return the loss of every optimizer step."""
        optimizer = self.make_optimizer(model)
        scheduler = self.make_scheduler(optimizer)
        logged = []
        for cycle in cycles(loader, accumulation_steps):
            total = sum(self.count(batch) for batch in cycle)
            logged.append(self.accumulate(model, cycle, total))
            self.finish(model, cycle, total)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        return logged

    def accumulate(self, model: nn.Module, cycle: list[dict[str, Tensor]], total: int) -> float:
        """Run the micro-batches of one cycle backward and return its loss."""
        seen = 0.0
        for batch in cycle:
            summed, count = self.summed(model, batch), self.count(batch)
            if self.style == "share":
                loss = summed / max(count, 1) * (count / total)
            else:
                loss = summed / (1 if self.style == "rescale" else total)
            loss.backward()  # type: ignore[no-untyped-call]
            seen += float(loss.detach())
        return seen / (total if self.style == "rescale" else 1)

    def finish(self, model: nn.Module, cycle: list[dict[str, Tensor]], total: int) -> None:
        """Do what comes between the last backward of a cycle and the step."""
        del cycle
        if self.style == "rescale":
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad /= total
        if self.max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)

    def count(self, batch: dict[str, Tensor]) -> int:
        """Return what the loss of a batch is a mean over: tokens, rows, or numbers."""
        if isinstance(self.batches, Tokens):
            return int((batch["labels"] >= 0).sum())
        return len(batch["x"])

    def summed(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Return the sum of the losses of a batch, times the scale."""
        inputs = batch["tokens"] if isinstance(self.batches, Tokens) else batch["x"]
        if self.precision in {"bfloat16", "float64"} and inputs.is_floating_point():
            inputs = inputs.to(next(model.parameters()).dtype)
        autocast = self.precision == "autocast_bfloat16"
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            out = model(inputs)
        if autocast:
            out = out.float()
        if isinstance(self.batches, Tokens):
            loss = functional.cross_entropy(
                out.flatten(0, 1), batch["labels"].flatten(), reduction="sum"
            )
        elif isinstance(self.batches, Values):
            loss = functional.mse_loss(out.mean(1), batch["y"].to(out.dtype), reduction="sum")
        else:
            loss = functional.cross_entropy(out.mean(1), batch["y"], reduction="sum")
        return loss * self.scale

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over all parameters."""
        p = list(model.parameters())
        # What is scaled with the loss is undone in the step, or training would explode.
        rate = 0.05 / self.scale
        make: dict[str, Callable[[], torch.optim.Optimizer]] = {
            "sgd": lambda: torch.optim.SGD(p, rate),
            "momentum": lambda: torch.optim.SGD(p, rate, 0.9, weight_decay=0.01 * self.scale),
            "nesterov": lambda: torch.optim.SGD(p, rate, 0.9, nesterov=True),
            "adam": lambda: torch.optim.Adam(p, 1e-3),
            "adamw": lambda: torch.optim.AdamW(p, 1e-3),
            "amsgrad": lambda: torch.optim.Adam(p, 1e-3, amsgrad=True),
            "adagrad": lambda: torch.optim.Adagrad(p, 1e-2),
            "rmsprop": lambda: torch.optim.RMSprop(p, 1e-3),
            "adamax": lambda: torch.optim.Adamax(p, 1e-3),
            "nadam": lambda: torch.optim.NAdam(p, 1e-3),
            "radam": lambda: torch.optim.RAdam(p, 1e-3),
            "adadelta": lambda: torch.optim.Adadelta(p),
            "rprop": lambda: torch.optim.Rprop(p, 1e-3),
            "asgd": lambda: torch.optim.ASGD(p, rate),
        }
        return make[self.optimizer]()

    def make_scheduler(
        self, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return the schedule, counted in optimizer steps."""
        if self.schedule == "linear":
            return torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=4)
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 + math.cos(i))
        if self.schedule == "step":
            return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return None


def cycles(loader: Any, accumulation_steps: int) -> Iterator[list[dict[str, Tensor]]]:
    """Yield the micro-batches of one optimizer step after another; the tail may hold fewer."""
    micro_batches = iter(loader)
    while cycle := list(islice(micro_batches, accumulation_steps)):
        yield cycle


class Model(nn.Module):
    """Layers between an input and a head: [B, T] or [B, F] to [B, T, outputs]; rows do not meet."""

    def __init__(self, loop: Loop, width: int = 4) -> None:
        super().__init__()
        self.is_tokens = isinstance(loop.batches, Tokens)
        self.inner: nn.Module = (
            nn.Embedding(VOCABULARY, width) if self.is_tokens else nn.Linear(FEATURES, width)
        )
        self.layers = nn.ModuleList(Layer(name, width) for name in loop.layers)
        self.head = nn.Linear(width, loop.batches.outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of every token; a row of features is one token."""
        hidden = self.inner(x)
        hidden = hidden if self.is_tokens else hidden[:, None]
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One layer over [B, T, W], by name; treats every row alone."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        make: dict[str, Callable[[], nn.Module]] = {
            "linear": lambda: nn.Linear(width, width),
            "tanh": nn.Tanh,
            "gelu": nn.GELU,
            "relu": nn.ReLU,
            "layer_norm": lambda: nn.LayerNorm(width),
            "rms_norm": lambda: nn.RMSNorm(width),
            "group_norm": lambda: nn.GroupNorm(2, width),
            "frozen_batch_norm": lambda: nn.BatchNorm1d(width).eval(),
            "residual": lambda: nn.Linear(width, width),
            "gated": lambda: nn.Linear(width, 2 * width),
            "dropout": lambda: nn.Dropout(0.1),
            "convolution": lambda: nn.Conv1d(width, width, 3, padding=1),
            "attention": lambda: nn.MultiheadAttention(width, 2, batch_first=True),
            "recurrent": lambda: nn.GRU(width, width, batch_first=True),
        }
        self.inner = make[name]()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; the shape stays."""
        if self.name == "residual":
            return x + functional.gelu(self.inner(x))
        if self.name == "gated":
            return functional.glu(self.inner(x), -1)
        if self.name == "attention":
            return x + self.inner(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]
        if self.name == "recurrent":
            return self.inner(x)[0]  # type: ignore[no-any-return]
        if self.name in {"group_norm", "frozen_batch_norm", "convolution"}:  # these take [B, W, T]
            return self.inner(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]
        return self.inner(x)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Layer:
        """Set the mode; batch norm stays frozen."""
        return super().train(mode and self.name != "frozen_batch_norm")
