"""Describe this machine for a bug report, and check one right and one wrong loop on it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from equivcheck import result as results
from equivcheck.api import measure
from equivcheck.cli.init import STARTER
from equivcheck.cli.screen import own_stdout, say
from equivcheck.report import words

HELP = "describe and test this installation"
_RIGHT = "(loss / accumulation_steps).backward()"
_WRONG = "loss.backward()"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add no argument."""
    del parser


def execute(options: argparse.Namespace) -> int:
    """Print facts and both checks; 70 if either does not come out as it must."""
    del options
    with own_stdout() as out:
        facts = {**results.environment(), **_torch_facts()}
        for name, value in facts.items():
            say(out, f"{name:<22} {value}")
        good = _checked("known-good", STARTER, "equivalent", ())
        bad = _checked("known-bad", STARTER.replace(_RIGHT, _WRONG), "divergent", ("EQ101",))
        for told, _ in (good, bad):
            say(out, told)
        well = good[1] and bad[1]
        say(out, "all well" if well else "this installation does not work")
    return 0 if well else 70


def _torch_facts() -> dict[str, object]:
    import torch  # noqa: PLC0415 - the only command besides running that needs it
    import torch.distributed as dist  # noqa: PLC0415

    left = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float64 repeats": bool(torch.equal(left @ left, left @ left)),
        "cuda": torch.cuda.is_available(),
        "gloo": dist.is_available() and dist.is_gloo_available(),
    }


def _checked(title: str, code: str, verdict: str, causes: tuple[str, ...]) -> tuple[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subject.py"
        path.write_text(code, encoding="utf-8")
        found = measure(str(path), accumulation_steps=4)
    [case] = found.cases
    well = case["verdict"] == verdict and tuple(words.codes(case)) == causes
    told = " ".join([case["verdict"], *words.codes(case), words.margin(case)])
    return f"{title:<22} {'ok' if well else 'FAILED'}: {told}", well
