"""What watching a script costs it; runs only where benchmarks are on.

The script as it is and the script under `equivcheck record` run in pairs, one after the other and each first in every
second pair, so that the machine's load is the same for both; every optimizer step is watched. Times are of whole
commands: imports, what `record` itself does, and writing included; processor time is of all their processes. Modules
are compiled once, before, as they are where they were installed.
"""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import sys, time
import torch
from torch import nn

layers, rows, updates, accum = map(int, sys.argv[1:])
torch.manual_seed(0)
torch.set_num_threads(1)
width = 1024
body = [each for _ in range(layers) for each in (nn.Linear(width, width), nn.LayerNorm(width), nn.GELU())]
model = nn.Sequential(nn.Linear(64, width), *body, nn.Linear(width, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
x, y = torch.randn(updates * accum * rows, 64), torch.randint(10, (updates * accum * rows,))
for index in range(updates * accum):
    mine = slice(index * rows, (index + 1) * rows)
    loss = nn.functional.cross_entropy(model(x[mine]), y[mine]) / accum
    loss.backward()
    if (index + 1) % accum == 0:
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
print(sum(p.numel() for p in model.parameters()))
"""
ACCUMULATION_STEPS = 4


@pytest.fixture(autouse=True)
def _benchmarks_are_on(request):
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("benchmarks are off; run `make bench`")


def spent(command: list[str], compiled: Path) -> tuple[float, float]:
    """Return the seconds that a command takes, and those of the processor, of all its processes."""
    given = {**os.environ, "PYTHONPYCACHEPREFIX": str(compiled)}
    given.pop("PYTHONDONTWRITEBYTECODE", None)
    before, start = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=given)
    wall, after = time.perf_counter() - start, os.times()
    return wall, (after[2] + after[3]) - (before[2] + before[3])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layers", "rows", "updates"),
    [
        pytest.param(10, 64, 4, id="10 million parameters, 4 optimizer steps"),
        pytest.param(10, 64, 20, id="10 million parameters"),
        pytest.param(28, 32, 16, id="30 million"),
    ],
)
def test_cost_of_a_script_that_is_only_watched(benchmark, tmp_path, layers, rows, updates):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    sizes = (layers, rows, updates, ACCUMULATION_STEPS)
    alone = [sys.executable, str(script), *map(str, sizes)]
    ours = [sys.executable, "-m", "equivcheck", "record", "-o", str(tmp_path / "recording")]
    watched = [*ours, "--optimizer-steps", str(updates), "--", *alone]
    bare, seen = [], []
    watched_first = itertools.cycle([False, True])

    def pair() -> None:
        both = [(alone, bare), (watched, seen)]
        for command, times in reversed(both) if next(watched_first) else both:
            times.append(spent(command, tmp_path / "compiled"))

    benchmark.pedantic(pair, rounds=7, warmup_rounds=1)

    for index, name in enumerate(("wall", "processor")):
        ratios = [b[index] / a[index] for a, b in zip(bare[1:], seen[1:], strict=True)]
        own = statistics.median(each[index] for each in bare[1:])
        benchmark.extra_info[f"{name}_times_alone"] = statistics.median(ratios)
        print(
            f"\n{name}: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"times its own {own:.2f} s"
        )
