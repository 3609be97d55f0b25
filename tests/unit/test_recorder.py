"""The recorder sees every optimizer, every call and every backward, and leaves torch as it was."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional
from torch.nn.utils import clip_grad
from torch.optim import Optimizer, lr_scheduler

from equivcheck.case import Case
from equivcheck.errors import StepError
from equivcheck.subject import load_subject
from equivcheck.subject_experiment import SubjectExperiment


class Loop:
    """A subject whose loop is given; 8 rows, 2 full batches."""

    def __init__(self, train, build=None):
        self.train = train
        self._build = build

    def build(self):
        return (
            self._build()
            if self._build
            else nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        )

    def batches(self):
        generator = torch.Generator().manual_seed(0)
        return [(torch.randn(8, 4, generator=generator), torch.arange(8) % 2) for _ in range(2)]


def experiment(train, **options):
    """Return the experiment of a loop at two micro-batches per step."""
    return SubjectExperiment(load_subject(Loop(train, **options)), Case("loop", 2))


def patched():
    """Return everything that the recorder, the promotion and the neutral dropout replace."""
    owners = [
        (torch.autograd, "_engine_run_backward"),
        (torch.autograd.graph, "_engine_run_backward"),
        (Optimizer, "zero_grad"),
        (nn.Module, "zero_grad"),
        (functional, "scaled_dot_product_attention"),
        (functional._VF, "dropout"),
        (torch, "batch_norm"),
        (torch, "Generator"),
        (np.random, "default_rng"),
        *((GradScaler, name) for name in ("scale", "unscale_", "step", "update")),
        *((each, "step") for each in (lr_scheduler.LRScheduler, lr_scheduler.SequentialLR)),
        *((each, "__init__") for each in (lr_scheduler.LRScheduler, lr_scheduler.StepLR)),
    ]
    hooks = sys.modules["torch.optim.optimizer"]
    return [
        *(getattr(owner, name) for owner, name in owners),
        *(
            [cell.cell_contents for cell in each.__closure__]
            for each in (clip_grad._clip_grads_with_norm_, clip_grad.clip_grad_value_)
        ),
        dict(hooks._global_optimizer_pre_hooks),
        dict(hooks._global_optimizer_post_hooks),
        torch.get_default_dtype(),
    ]


def plain(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i, (x, y) in enumerate(loader):
        (functional.cross_entropy(model(x), y) / accumulation_steps).backward()
        if (i + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()


def test_torch_is_left_as_it_was_found():
    before = patched()
    lab = experiment(plain)
    lab.reference()
    lab.candidate()
    lab.native("native_candidate")

    assert before == patched()


def test_torch_is_left_as_it_was_found_after_an_exception():
    def train(model, loader, accumulation_steps):
        plain(model, loader, accumulation_steps)
        message = "late"
        raise ValueError(message)

    before = patched()
    lab = experiment(train)
    for run in (lab.reference, lambda: lab.native("native_reference")):
        with pytest.raises(StepError, match="late"):
            run()

    assert before == patched()


OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SGD foreach": {"lr": 0.1, "foreach": True},
    "SGD fused": {"lr": 0.1, "fused": True},
    "Adam": {},
    "Adam fused": {"fused": True},
    "AdamW": {"foreach": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "Adagrad": {},
    "Adadelta": {},
    "ASGD": {},
    "RMSprop": {},
    "Rprop": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_seen(name):
    def train(model, loader, accumulation_steps):
        make = getattr(torch.optim, name.split()[0])
        optimizer = make(model.parameters(), **OPTIMIZERS[name])
        for i, (x, y) in enumerate(loader):
            (functional.cross_entropy(model(x), y) / accumulation_steps).backward()
            if (i + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()

    lab = experiment(train)

    assert len(lab.reference().steps) == len(lab.candidate().steps) == 2
    assert [step.matched for step in lab.candidate().steps] == [0, 1]
    assert lab.judgement().same
    assert lab.judgement().compared > 0


def test_a_closure_is_seen_at_its_first_evaluation():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
        cycle = []
        for batch in loader:
            cycle.append(batch)
            if len(cycle) == accumulation_steps:

                def closure(cycle=tuple(cycle)):
                    optimizer.zero_grad()
                    total = 0.0
                    for x, y in cycle:
                        loss = functional.cross_entropy(model(x), y) / accumulation_steps
                        loss.backward()
                        total += loss.detach()
                    return total

                optimizer.step(closure)
                cycle.clear()

    lab = experiment(train)

    assert len(lab.candidate().steps) == 2
    assert lab.judgement().same


def test_gradients_taken_with_autograd_grad_are_seen():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parameters = list(model.parameters())
        for i, (x, y) in enumerate(loader):
            loss = functional.cross_entropy(model(x), y) / accumulation_steps
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                p.grad = g if p.grad is None else p.grad + g
            if (i + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()

    lab = experiment(train)

    assert [backward.index for backward in lab.candidate().backwards] == [0, 1, 2, 3]
    assert lab.judgement().same


def test_the_timeline_holds_every_call_in_order():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            milestones=[1],
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, (x, y) in enumerate(loader):
            scaler.scale(functional.cross_entropy(model(x), y) / accumulation_steps).backward()
            if (i + 1) % accumulation_steps == 0:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                nn.utils.clip_grad_value_(model.parameters(), 0.05)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()

    kinds = [event.kind for event in experiment(train).candidate().timeline]

    cycle = ["fetch", "backward", "fetch", "backward", "unscale", "clip", "clip", "step", "scaler"]
    assert kinds == [*cycle, "scheduler", "zero_grad"] * 2


def test_what_is_no_call_is_seen_too():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i, (x, y) in enumerate(loader):
            functional.cross_entropy(model(x), y).backward()
            for p in model.parameters():
                p.grad /= accumulation_steps
                p.data.mul_(0.99)
            if (i + 1) % accumulation_steps == 0:
                optimizer.step()
                for p in model.parameters():
                    p.grad = None

    kinds = [event.kind for event in experiment(train).candidate().timeline]

    assert kinds.count("edited") == 2
    assert kinds.count("parameters_changed") >= 2
    assert "zero_grad" not in kinds


def test_gradients_before_an_active_clip_are_compared():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for i, (x, y) in enumerate(loader):
            functional.cross_entropy(model(x), y).backward()
            if (i + 1) % accumulation_steps == 0:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
                optimizer.step()
                optimizer.zero_grad()

    lab = experiment(train)
    step = lab.candidate().steps[0]
    scales = {round(each.scale, 6) for each in step.gradients.values()}

    assert step.clipped
    assert scales == {2.0}


def test_a_skipped_step_is_seen():
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for i, (x, y) in enumerate(loader):
            loss = functional.cross_entropy(model(x), y) / accumulation_steps
            scaler.scale(loss * (float("inf") if i == 0 else 1.0)).backward()
            if (i + 1) % accumulation_steps == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()

    recording = experiment(train).reference()

    assert [step.skipped for step in recording.steps] == [True, False]
    assert "skipped" in [event.kind for event in recording.timeline]
