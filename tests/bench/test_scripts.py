"""What watching a script costs it; runs only where benchmarks are on.

The script as it is and the script under `equivcheck record` run in turn, so that the machine's load is the same for
both, every optimizer step watched; the ratio is that of whole processes, imports and writing included.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

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


@pytest.fixture(autouse=True)
def _benchmarks_are_on(request):
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("benchmarks are off; run `make bench`")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("layers", "rows", "updates"),
    [
        pytest.param(10, 64, 20, id="10 million parameters"),
        pytest.param(28, 32, 16, id="30 million"),
    ],
)
def test_cost_of_a_script_that_is_only_watched(benchmark, tmp_path, layers, rows, updates):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    alone = [sys.executable, str(script), *map(str, (layers, rows, updates, 4))]
    ours = [sys.executable, "-m", "equivcheck", "record", "-o", str(tmp_path / "recording")]
    watched = [*ours, "--optimizer-steps", str(updates), "--", *alone]
    bare = []

    def run_alone():
        start = time.perf_counter()
        subprocess.run(alone, check=True, stdout=subprocess.DEVNULL)
        bare.append(time.perf_counter() - start)

    def run_watched():
        subprocess.run(watched, check=True, capture_output=True)

    benchmark.pedantic(run_watched, setup=run_alone, rounds=3, warmup_rounds=1)

    ratio = benchmark.stats.stats.median / statistics.median(bare[1:])
    benchmark.extra_info["times_alone"] = ratio
    print(f"\n{ratio:.3f} times its own {statistics.median(bare[1:]):.2f} s")
