"""Write a subject to start from and print snippets for configuration and CI.

Never overwrites a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from equivcheck.errors import UsageError

HELP = "write a subject to start from"

STARTER = '''\
"""A subject for equivcheck: put your model, your data and your own training loop here."""

import torch


def build():
    """Return a fresh model; called under a fixed seed."""
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))


def batches():
    """Return full batches in order, one per optimizer step; dimension 0 is the sample."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        yield {
            "x": torch.randn(16, 8, generator=generator),
            "y": torch.randn(16, 1, generator=generator),
        }


def train(model, loader, accumulation_steps):
    """Your own loop, unchanged; the loader yields micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(loader):
        loss = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
'''

CONFIGURATION = """\
[tool.equivcheck]
accumulation_steps = [2, 4]
"""

WORKFLOW = """\
- run: pip install equivcheck
- run: equivcheck run train_step.py --junit equivcheck.xml
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `init`."""
    parser.add_argument("path", metavar="PATH", nargs="?", default="train_step.py")


def execute(options: argparse.Namespace) -> int:
    """Write the starter and print what to do next."""
    path = Path(options.path)
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(STARTER)
    except FileExistsError:
        raise UsageError(
            f"{path} exists and is left as it is", fix="equivcheck init other_name.py"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    print(f"wrote {path}\n\nIn pyproject.toml:\n\n{_indented(CONFIGURATION)}")
    print(f"In a workflow:\n\n{_indented(WORKFLOW.replace('train_step.py', str(path)))}")
    print(f"Next: equivcheck run {path}")
    return 0


def _indented(snippet: str) -> str:
    return "".join(f"    {line}\n" for line in snippet.splitlines())
