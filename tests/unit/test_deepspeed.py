"""DeepSpeed's own clips are seen, at every stage; its modules are played by others, which clip as they do.

`make test-frameworks` runs the real ones.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.subject import load_subject

LIMIT = 1e-3  # far below the norm of any gradient here: the clip hides every constant factor


def clip_grad_norm_(parameters, max_norm, norm_type=2):
    held = [p for p in parameters if p.grad is not None]
    norm = torch.stack([p.grad.norm(norm_type) for p in held]).norm(norm_type)
    for p in held:
        p.grad.mul_(torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


class DeepSpeedZeroOptimizer:
    """Clips the flat gradients of its partitions."""

    loss_scale, clip_grad = 1.0, LIMIT

    def __init__(self, parameters):
        self.single_partition_of_fp32_groups = parameters

    def unscale_and_clip_grads(self, flat, total_norm):
        if self.clip_grad > 0.0:
            for each in flat:
                each.mul_(torch.clamp(self.clip_grad / (total_norm + 1e-6), max=1.0))


class DeepSpeedZeroOptimizer_Stage3:  # noqa: N801 - DeepSpeed's own name
    """Clips the flat gradient of one group after the other."""

    loss_scale, clip_grad = 1.0, LIMIT

    def __init__(self, parameters):
        self.fp32_partitioned_groups_flat = parameters

    def unscale_and_clip_grads(self, which, total_norm):
        if self.clip_grad > 0.0:
            held = self.fp32_partitioned_groups_flat[which]
            held.grad.mul_(torch.clamp(self.clip_grad / (total_norm + 1e-6), max=1.0))


@pytest.fixture
def imported(monkeypatch):
    """Let it look as if a script had imported DeepSpeed."""
    for name, attributes in {
        "deepspeed.runtime.engine": {"clip_grad_norm_": clip_grad_norm_},
        "deepspeed.runtime.zero.stage_1_and_2": {"DeepSpeedZeroOptimizer": DeepSpeedZeroOptimizer},
        "deepspeed.runtime.zero.stage3": {
            "DeepSpeedZeroOptimizer_Stage3": DeepSpeedZeroOptimizer_Stage3
        },
    }.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


def clipped(stage, parameters):
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    if stage == 0:
        sys.modules["deepspeed.runtime.engine"].clip_grad_norm_(iter(parameters), LIMIT)
    elif stage == 3:
        for which in range(len(parameters)):
            DeepSpeedZeroOptimizer_Stage3(parameters).unscale_and_clip_grads(which, norm)
    else:
        for each in parameters:
            DeepSpeedZeroOptimizer(parameters).unscale_and_clip_grads([each.grad], norm)


@pytest.mark.usefixtures("imported")
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(("share", "code"), [("accumulation_steps", None), ("1", "EQ101")])
def test_a_factor_is_seen_below_a_clip_that_hides_it(stage, share, code):
    """The gradient is compared before the clip; and the modules are left as they were."""

    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        divisor = accumulation_steps if share != "1" else 1
        for index, (x, y) in enumerate(loader):
            (nn.functional.mse_loss(model(x), y) / divisor).backward()
            if (index + 1) % accumulation_steps == 0:
                clipped(stage, list(model.parameters()))
                optimizer.step()
                optimizer.zero_grad()

    subject = SimpleNamespace(
        build=lambda: nn.Linear(4, 2),
        batches=lambda: [(torch.randn(8, 4), torch.randn(8, 2)) for _ in range(2)],
        train=train,
    )
    case = run_case(load_subject(subject), Case("loop", 4))

    assert case["verdict"] == ("divergent" if code else "equivalent"), case["headline"]
    assert [(c["code"], c["status"]) for c in case["causes"]] == (
        [(code, "proved")] if code else []
    )
    assert sys.modules["deepspeed.runtime.engine"].clip_grad_norm_ is clip_grad_norm_
