"""Estimate what a case needs before it runs, and refuse what cannot fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equivcheck import bridges
from equivcheck.errors import UsageError
from equivcheck.execute import process_state
from equivcheck.feed import Data
from equivcheck.shelf import IN_MEMORY
from equivcheck.subject import Code

# Float64 copies of all parameters that the largest role holds at once: weights, gradients, two moments, and the copy
# of gradients that is taken before a clip.
COPIES = 5
DOUBLE = 8
# Multiply-adds of a float64 step on one core of a current machine, per second; only for the time that is printed.
RATE = 5e9
ROLES = 5


def estimate(code: Code, data: Data) -> dict[str, Any]:
    """Return parameters, bytes and seconds that a case is expected to need.

    Args:
        code: The user's, as executed for this alone: a model is built of it.
        data: The full batches.

    Bytes are those of float64 parameters, gradients and optimizer state; activations are not known beforehand.
    """
    with process_state(), bridges.installed():
        try:
            model = code.build()
            bridge = bridges.across(model)
        except (Exception, SystemExit):  # noqa: BLE001 - the run itself reports it, with the user's traceback
            return {"parameters": 0, "bytes": 0, "disk_bytes": 0, "seconds": 0.0}
    model = model if bridge is None else bridge.module
    count = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else 0
    needed = count * DOUBLE * COPIES
    kept = count * DOUBLE * 4 * len(data.rows)
    # Forward and backward take about 6 multiply-adds per parameter and row.
    seconds = ROLES * 6.0 * count * data.total / (RATE * torch.get_num_threads())
    return {
        "parameters": count,
        "bytes": needed + min(kept, IN_MEMORY),
        "disk_bytes": max(kept - IN_MEMORY, 0),
        "seconds": seconds,
    }


def available() -> int | None:
    """Return the bytes of memory that are free for us, or None where that cannot be known."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def refuse_what_cannot_fit(needs: dict[str, Any]) -> None:
    """Raise a UsageError if a case needs more memory than there is."""
    free = available()
    if free is not None and needs["bytes"] > free:
        raise UsageError(
            f"does-not-fit: {needs['bytes'] / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free",
            where=f"{needs['parameters']:,} parameters in float64",
            expected="weights, gradients and optimizer state of one run to fit in memory",
            fix="build() a smaller model of the same kind: the verdict does not depend on its size",
        )
