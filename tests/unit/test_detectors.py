"""What detectors say where their signature is incomplete: each by a loop that has such a fault."""

from __future__ import annotations

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.report import words
from equivcheck.subject import load_subject

SUBJECT = """
from __future__ import annotations

import copy
import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional as F

ROWS = [8, 8]

class Norm(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1).sqrt()

class Sparse(nn.Module):
    def forward(self, x):
        return x.to_sparse()

class Dense(nn.Module):
    def forward(self, x):
        return x.to_dense()

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 4, generator=generator), torch.arange(rows) % 2) for rows in ROWS]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logged, seen = [], []
    for index, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y)
        seen.append(loss.item())
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
            mean = sum(seen) / len(seen)
            logged.append(mean)
            seen = []
    return logged
"""
LOSS = "loss = F.cross_entropy(model(x), y)"
BACKWARD = "(loss / accumulation_steps).backward()"
UNDIVIDED = (BACKWARD, "loss.backward()")
LOG = "logged.append(mean)"
NO_LOG = ("    return logged\n", "")
COUPLED = ("nn.Tanh()", "Norm()")
BEGIN = "    logged, seen = [], []\n"
EVERY = ("if (index + 1) % accumulation_steps == 0:", "if True:")
AT_THE_END = ("if (index + 1) % accumulation_steps == 0:", "if index + 1 == len(loader):")


def only(condition):
    """Return the replacement that lets a loop refuse to run otherwise."""
    return (BEGIN, f"    assert {condition}\n{BEGIN}")


def times(factor):
    """Return the replacement that multiplies the loss by a factor of K."""
    return (BACKWARD, f"(loss / accumulation_steps * ({factor})).backward()")


def averaged(rate):
    """Return the replacements with which a loop keeps a running average of its weights, moved after every step."""
    zeroed = "            optimizer.zero_grad()\n"
    pairs = "            for kept, p in zip(average.parameters(), model.parameters()):\n"
    moved = f"                kept.data.lerp_(p.data, {rate})\n"
    return (
        (BEGIN, f"    average = copy.deepcopy(model)\n{BEGIN}"),
        (zeroed, f"{zeroed}{pairs}{moved}"),
    )


def centred(loss):
    """Return the replacements with which a loop subtracts a running mean of its own from the targets of a loss."""
    return (
        (BEGIN, f"    centre = 0.0\n{BEGIN}"),
        (
            LOSS,
            f"{loss}\n        centre = 0.9 * centre + 0.1 * x.mean()",
        ),
    )


def rate(formula):
    """Return the replacement that sets the learning rate before every optimizer step, by a formula."""
    step = "            optimizer.step()"
    return (step, f"            optimizer.param_groups[0]['lr'] = {formula}\n{step}")


TWO = "accumulation_steps in (1, 2)"
ALONE_REFUSED = only("accumulation_steps > 1 or len(loader) <= 2")
TOLD = {
    "an addend with a factor that no rule gives": (
        "EQ000 suspected",
        NO_LOG,
        times("1.0"),
        (
            LOSS,
            (
                "penalty = model[0].weight.square().sum() * (0.37 if accumulation_steps > 1 else 1.0)\n"
                f"        {LOSS} + penalty * accumulation_steps"
            ),
        ),
    ),
    "such an addend beside labels that are all zero": (
        "EQ000 suspected",
        NO_LOG,
        ("torch.arange(rows) % 2", "torch.zeros(rows, dtype=torch.long)"),
        times("1.0"),
        (
            LOSS,
            (
                "penalty = model[0].weight.square().sum() * (0.37 if accumulation_steps > 1 else 1.0)\n"
                f"        {LOSS} + penalty * accumulation_steps"
            ),
        ),
    ),
    "a graph that cannot be walked twice": (
        "EQ101 proved",
        NO_LOG,
        UNDIVIDED,
        (
            LOSS,
            (
                "x.requires_grad_()\n"
                "        out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True)\n"
                "        loss = F.cross_entropy(out, y) + model[2].bias.square().sum()"
            ),
        ),
    ),
    "rows coupled by hand, under a mean": ("EQ201 proved", NO_LOG, COUPLED),
    "rows coupled by hand, behind a sparse tensor": (
        "EQ201 proved",
        NO_LOG,
        ("nn.Tanh()", "Sparse(), Dense(), Norm()"),
    ),
    "rows coupled by hand, micro-batches alone refused": (
        "EQ201 proved",
        NO_LOG,
        ALONE_REFUSED,
        COUPLED,
    ),
    "rows coupled by hand, under a sum": (
        "EQ201 proved",
        NO_LOG,
        COUPLED,
        UNDIVIDED,
        (LOSS, "loss = F.cross_entropy(model(x), y, reduction='sum')"),
    ),
    "rows coupled by hand, and not divided": (
        "EQ101 proved EQ201 proved",
        NO_LOG,
        COUPLED,
        UNDIVIDED,
    ),
    "a log that no rule gives": (
        "EQ701 proved",
        (LOG, "logged.append(mean + 0.01 * len(logged) * (accumulation_steps - 1))"),
    ),
    "a log of the last, micro-batches alone refused": (
        "EQ701 proved",
        ALONE_REFUSED,
        (LOG, "logged.append(seen[-1])"),
    ),
    "a log times a constant": (
        "EQ701 proved",
        (LOG, "logged.append(mean * (1.7 if accumulation_steps > 1 else 1.0))"),
    ),
    "one step for all batches, and no division": (
        "EQ101 proved",
        NO_LOG,
        ("[8, 8]", "[8, 8, 8]"),
        UNDIVIDED,
        AT_THE_END,
    ),
    "one step for all batches, divided twice": (
        "EQ102 proved",
        NO_LOG,
        ("[8, 8]", "[8, 8, 8]"),
        times("1 / accumulation_steps"),
        AT_THE_END,
    ),
    "a draw per optimizer step, and no division": (
        "EQ101 proved",
        NO_LOG,
        UNDIVIDED,
        (
            LOSS,
            (
                "if index % accumulation_steps == 0:\n            shift = torch.randn(4)\n"
                "        loss = F.cross_entropy(model(x + shift), y)"
            ),
        ),
    ),
    "an addend that reaches no parameter, and no division": (
        "EQ101 proved",
        NO_LOG,
        UNDIVIDED,
        (LOSS, f"x.requires_grad_()\n        {LOSS} + x.square().mean()"),
    ),
    "rows moved against the loss first, and no division": (
        "EQ101 proved",
        NO_LOG,
        UNDIVIDED,
        (
            LOSS,
            (
                "x.requires_grad_()\n        F.cross_entropy(model(x), y).backward(inputs=[x])\n"
                "        x = (x + 0.1 * x.grad.sign()).detach()\n"
                f"        {LOSS}"
            ),
        ),
    ),
    "a running mean of the loop's own, and no division": (
        "EQ000 suspected",
        NO_LOG,
        UNDIVIDED,
        *centred("loss = (model(x) - centre).square().mean()"),
    ),
    "a running mean of the loop's own, beside an average by a rate that no count gives": (
        "EQ309 suspected",
        NO_LOG,
        ("[8, 8]", "[8, 8, 8]"),
        *centred("loss = (model(x) - centre).square().mean()"),
        *averaged("0.1 * accumulation_steps"),
    ),
    "a running mean of the loop's own, and rows that a loss couples": (
        "EQ202 suspected",
        NO_LOG,
        *centred("loss = (model(x) - centre).square().mean() + model(x).std(0).sum()"),
    ),
    "a rate times K, another K refused": (
        "EQ313 proved",
        NO_LOG,
        only(TWO),
        rate("0.1 * accumulation_steps"),
    ),
    "a rate times a constant": (
        "EQ000 suspected",
        NO_LOG,
        rate("0.3 if accumulation_steps > 1 else 0.1"),
    ),
    "a rate that is zero in the full batch alone": (
        "EQ000 suspected",
        NO_LOG,
        rate("0.1 if accumulation_steps > 1 else 0.05 * index"),
    ),
    "a rate that no count gives": (
        "EQ000 suspected",
        NO_LOG,
        (
            "            optimizer.step()",
            (
                "            optimizer.param_groups[0]['lr'] = 0.1 / (accumulation_steps * 3 + index)\n"
                "            optimizer.step()"
            ),
        ),
    ),
    "a rate by count, many micro-batches refused": (
        "EQ307 proved",
        NO_LOG,
        only("accumulation_steps > 1 or len(loader) <= 2"),
        (
            "            optimizer.step()",
            "            optimizer.param_groups[0]['lr'] = 0.1 / (index + 1)\n            optimizer.step()",
        ),
    ),
    "a horizon, other lengths refused": (
        "EQ308 proved",
        NO_LOG,
        only("len(loader) in (2, 4, 8)"),
        (
            BEGIN,
            "    scheduler = torch.optim.lr_scheduler.LinearLR(\n"
            "        optimizer, 1.0, 0.5, total_iters=len(loader)\n    )\n" + BEGIN,
        ),
        (
            "            optimizer.zero_grad()\n",
            "            optimizer.zero_grad()\n            scheduler.step()\n",
        ),
    ),
    "a step at every micro-batch": ("EQ303 proved", NO_LOG, EVERY),
    "a step at every micro-batch, another K refused": ("EQ303 proved", NO_LOG, only(TWO), EVERY),
    "a step at every micro-batch, too few rows for another K": (
        "EQ303 proved",
        NO_LOG,
        ("[8, 8]", "[2, 2]"),
        EVERY,
    ),
    "a factor, another K refused": (
        "EQ104 suspected",
        only(TWO),
        times("0.75 if accumulation_steps > 1 else 1.0"),
        NO_LOG,
    ),
    "a factor of one K alone": (
        "EQ104 suspected",
        NO_LOG,
        times("0.75 if accumulation_steps == 2 else 1.0"),
    ),
    "a factor, too few rows for another K": (
        "EQ104 suspected",
        NO_LOG,
        ("[8, 8]", "[2, 2]"),
        times("0.75 if accumulation_steps > 1 else 1.0"),
    ),
    "a factor that is no ratio": (
        "EQ000 suspected",
        NO_LOG,
        times("2**0.5 if accumulation_steps > 1 else 1.0"),
    ),
    "a factor, too few labels for a count to tell": (
        "EQ104 proved",
        NO_LOG,
        ("[8, 8]", "[6, 6]"),
        ("torch.arange(rows) % 2", "(torch.arange(rows) % 3 == 1).long()"),
        times("0.75 if accumulation_steps > 1 else 1.0"),
    ),
    "a clip that the full batch does not make": (
        "EQ000 suspected",
        NO_LOG,
        (
            "            optimizer.step()",
            (
                "            if accumulation_steps > 1:\n"
                "                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)\n"
                "            optimizer.step()"
            ),
        ),
    ),
    "an average by a rate that no count gives": (
        "EQ309 suspected",
        NO_LOG,
        ("[8, 8]", "[8, 8, 8]"),
        *averaged("0.1 * accumulation_steps"),
    ),
    "an average by a rate of one step": (
        "EQ309 suspected",
        NO_LOG,
        ("[8, 8]", "[8]"),
        *averaged("1 / (index + 2)"),
    ),
    "an average by a rate, micro-batches alone refused": (
        "EQ309 suspected",
        NO_LOG,
        ALONE_REFUSED,
        *averaged("1 / (index + 2)"),
    ),
    "an average by a rate": (
        "EQ309 proved",
        NO_LOG,
        ("[8, 8]", "[8, 8, 8]"),
        *averaged("1 / (index + 2)"),
    ),
    "an average that is moved before anything is trained": (
        "EQ309 proved",
        NO_LOG,
        (BEGIN, f"    copies = [torch.zeros_like(p) for p in model.parameters()]\n{BEGIN}"),
        (
            f"        {LOSS}",
            (
                "        for copy, p in zip(copies, model.parameters()):\n"
                f"            copy.lerp_(p.detach(), 0.1)\n        {LOSS}"
            ),
        ),
    ),
    "an average that starts elsewhere, and is moved before anything is trained": (
        "EQ309 proved",
        NO_LOG,
        (BEGIN, f"    copies = [1.1 * p.detach() for p in model.parameters()]\n{BEGIN}"),
        (
            f"        {LOSS}",
            (
                "        for copy, p in zip(copies, model.parameters()):\n"
                f"            copy.lerp_(p.detach(), 0.1)\n        {LOSS}"
            ),
        ),
    ),
    "a step that is left out, beside a tail": (
        "EQ311 proved EQ105 proved",
        NO_LOG,
        ("[8, 8]", "[8, 8, 4]"),
        (
            EVERY[0],
            "if (index + 1) % accumulation_steps == 0 and (accumulation_steps == 1 or index > 2):",
        ),
    ),
    "another cycle length, and a tail that leaks": (
        "EQ311 proved EQ310 proved",
        NO_LOG,
        ("[8, 8]", "[8, 8, 4]"),
        (EVERY[0], "if (index + 1) % (accumulation_steps + 1) == 0 or index + 1 == len(loader):"),
    ),
}


@pytest.mark.parametrize("name", TOLD)
def test_a_fault_is_named_as_far_as_it_can_be_told(tmp_path, name):
    """Proved where putting it right shows it, suspected where nothing can, unexplained otherwise."""
    expected, *replaced = TOLD[name]
    source = SUBJECT
    for line, other in replaced:
        assert line in source
        source = source.replace(line, other)
    path = tmp_path / "subject.py"
    path.write_text(source, encoding="utf-8")
    case = run_case(load_subject(str(path)), Case(str(path), 2))
    causes = [f"{each['code']} {each['status']}" for each in case["causes"]]

    assert case["verdict"] == "divergent"
    assert " ".join(causes) == expected


def roles_of(folder, *replacements):
    """Return the roles of every run that the check of a loop made."""
    text = SUBJECT
    for before, after in replacements:
        assert before in text
        text = text.replace(before, after)
    path = folder / "train_step.py"
    path.write_text(text, encoding="utf-8")
    entry = run_case(load_subject(str(path)), Case(str(path), accumulation_steps=4))
    return [each["role"] for each in entry["runs"]]


def test_addends_are_taken_only_where_a_loss_is_a_sum(tmp_path):
    """A loss with one addend needs no runs to tell its addends apart; one run begins with the last micro-batch."""
    one = roles_of(tmp_path, NO_LOG, (BACKWARD, "(loss / 1.7).backward()"))
    several = roles_of(
        tmp_path,
        NO_LOG,
        (LOSS, f"{LOSS} + model[0].weight.square().sum()"),
        (BACKWARD, "(loss / 1.7).backward()"),
    )

    assert (one.count("pieces"), several.count("pieces")) == (2, 3)


FEW = """
import torch
from torch.nn import functional as F

def build():
    return torch.nn.Linear(4, 1)

def batches():
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(16, n, generator=generator) for n in (4, 1)) for _ in range(2)]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, (x, y) in enumerate(loader):
        loss = F.mse_loss(model(x), y)
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""
FEW_LOSS = "loss = F.mse_loss(model(x), y)"
OF_ALL_ROWS = "d = model(x) - y\n        loss = d.mean() ** 2 + d.exp().mean().log()"


@pytest.mark.parametrize(
    ("before", "after", "split", "expected"),
    [
        (BACKWARD, BACKWARD, "even", []),
        (BACKWARD, BACKWARD, "uneven", ["EQ103 proved"]),
        (BACKWARD, "loss.backward()", "even", ["EQ101 proved"]),
        (BACKWARD, "loss.backward()", "uneven", ["EQ101 proved"]),
        (BACKWARD, "(loss / accumulation_steps**2).backward()", "uneven", ["EQ102 proved"]),
        (BACKWARD, "(loss * len(x) / 16).backward()", "uneven", []),
        (FEW_LOSS, OF_ALL_ROWS, "uneven", ["EQ000 suspected"]),
    ],
    ids=["right", "means", "sums", "sums of parts", "twice", "rows", "rows together"],
)
def test_more_pieces_than_parameters_leave_the_weights_that_a_loss_may_have(
    tmp_path, before, after, split, expected
):
    """Any gradient is a sum of so many pieces: only weights that are known beforehand say something."""
    assert before in FEW
    path = tmp_path / "subject.py"
    path.write_text(FEW.replace(before, after), encoding="utf-8")
    case = run_case(load_subject(str(path)), Case(str(path), 8, split=split))

    assert [f"{each['code']} {each['status']}" for each in case["causes"]] == expected


def test_weights_that_cannot_be_told_are_said_to_be_so():
    case = {
        "parameters_count": 5,
        "attribution": {"reference_weights": [None] * 8, "candidate_weights": [None] * 8},
    }

    assert words.weights(case) == [("", "8 pieces, 5 parameters: weights cannot be told")]
