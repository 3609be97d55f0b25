"""What a watched process keeps of its tensors is what a loop that looks by itself sees."""

from __future__ import annotations

import copy
import gc
import math
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from equivcheck.attach.models import Built, owner
from equivcheck.noise import coordinates
from tests.scripts.test_processes import watched  # noqa: F401 - a fixture

# Two micro-batches to an optimizer step; what the loop sees by itself lies in `seen.pt`.
CLIPPED = """
import copy, pathlib, torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 300), torch.nn.ReLU(), torch.nn.Linear(300, 300))
model = copy.deepcopy(model).to(DTYPE)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
seen = []
for _ in range(2):
    added = []
    for _ in range(2):
        before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        (FACTOR * model(torch.randn(4, 3, dtype=DTYPE)).square().mean()).backward()
        added.append([p.grad - b if b is not None else p.grad.clone() for p, b in zip(model.parameters(), before)])
    gradients = [p.grad.clone() for p in model.parameters()]
    CLIP
    optimizer.step()
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    seen.append((added, gradients, after))
torch.save(seen, pathlib.Path(__file__).with_name("seen.pt"))
"""


def squares(gradients):
    return sum(float(each.double().square().sum()) for each in gradients)


def sampled(tensors, chosen):
    """Return the chosen coordinates of tensors, which come in the order of the names."""
    flat = [each.double().flatten() for each in tensors]
    return [f if c is None else f[c] for f, c in zip(flat, chosen.values(), strict=True)]


@pytest.mark.parametrize(
    ("dtype", "factor", "clip"),
    [
        ("float32", "1.0", "torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)"),
        ("float32", "1.0", "torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)"),
        ("float32", "1.0", ""),
        # Squares of these are no float32 numbers, and they are finite all the same.
        ("float32", "1e22", "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"),
        ("float32", "float('inf')", ""),
        ("float16", "1e3", "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"),
        ("bfloat16", "1.0", "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)"),
    ],
    ids=["norm", "value", "no clip", "large", "infinite", "float16", "bfloat16"],
)
def test_gradients_are_kept_as_they_were_before_the_clip(watched, tmp_path, dtype, factor, clip):  # noqa: F811
    """Samples are exact, of the gradients before the clip; norms and finiteness are of all elements."""
    source = CLIPPED.replace("DTYPE", f"torch.{dtype}").replace("FACTOR", factor)
    ended, (recording, facts) = watched(source.replace("CLIP", clip or "pass"))

    assert ended.code == 0, ended.output
    seen = torch.load(tmp_path / "seen.pt")
    assert [len(recording.steps), len(facts.contributions), len(facts.after)] == [2, 4, 2]
    for step, ((first, _), gradients, after), kept in zip(
        recording.steps, seen, facts.after, strict=True
    ):
        names = list(step.sample)
        assert [*kept] == names == ["0.weight", "0.bias", "2.weight", "2.bias"]
        chosen = coordinates(dict(zip(names, map(torch.numel, gradients), strict=True)))
        assert any(each is not None for each in chosen.values())

        for found, tensors in ((step.sample, gradients), (kept, after)):
            for mine, whole in zip(found.values(), sampled(tensors, chosen), strict=True):
                torch.testing.assert_close(mine, whole, rtol=0, atol=0, equal_nan=True)
        finite = all(bool(each.isfinite().all()) for each in gradients)
        assert step.finite == finite
        assert step.clipped == bool(clip)
        if finite:
            assert step.norm == pytest.approx(math.sqrt(squares(gradients)), rel=2e-3)
        # The first backward of a cycle adds exactly what is there afterwards.
        added = facts.contributions[2 * step.index]
        for name, whole in zip(names, sampled(first, chosen), strict=True):
            torch.testing.assert_close(added[name], whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("copied", [False, True], ids=["built", "copied"])
def test_the_model_that_is_trained_is_found(copied):
    """Among all modules that were seen as they were built; or, of copies, among all objects."""
    built = Built()
    with ExitStack() as stack:
        built.install(stack)
        body = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    if copied:
        other, body = body, copy.deepcopy(body)
    else:
        other = copy.deepcopy(body)
    optimizer = torch.optim.SGD(body.parameters(), lr=0.1)

    assert owner(other, [optimizer], built) is body
    assert nn.Linear(1, 1) not in built.modules()  # after the stack was closed
    known = len(built.modules())
    del body, optimizer
    gc.collect()
    assert len(built.modules()) == (known if copied else known - 3)
