"""What a verdict costs over the five runs that it needs; runs only where benchmarks are on.

Ratios are taken within one test, case and bare runs in turn, so that the machine's load is the
same; each is the median of its rounds. Peak memory is that of processes of their own.

K accumulation steps.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equivcheck.subject import load_subject

BENCH = Path(__file__).parent
K = 4
# Width and number of square layers: 9.8 million parameters, and 18 thousand.
LARGE = (2080, 2)
TINY = (32, 1)


@pytest.fixture(autouse=True)
def _benchmarks_are_on(request):
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("benchmarks are off; run `make bench`")
    # Deterministic mode fills fresh memory, which would be measured too.
    torch.use_deterministic_algorithms(mode=False)
    torch.set_num_threads(2)


@pytest.fixture
def bare(monkeypatch):
    """Return the module that makes a case, and its runs with nobody looking."""
    monkeypatch.syspath_prepend(BENCH)
    import bare

    return bare


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("size", "rows", "rounds"),
    [
        pytest.param(LARGE, 4096, 2, id="10 million parameters, 4096 samples"),
        pytest.param(LARGE, 16, 5, id="10 million parameters, 16 samples"),
        pytest.param(TINY, 16, 20, id="18 thousand parameters, 16 samples"),
    ],
)
def test_cost_of_a_case_over_its_own_runs(benchmark, tmp_path, bare, size, rows, rounds):
    subject = load_subject(str(bare.write_subject(tmp_path, *size, rows)))
    alone = []

    def runs_alone():
        start = time.perf_counter()
        bare.bare(subject, K)
        alone.append(time.perf_counter() - start)

    benchmark.pedantic(bare.case, (subject, K), setup=runs_alone, rounds=rounds, warmup_rounds=1)

    ratio = benchmark.stats.stats.median / statistics.median(alone[1:])
    benchmark.extra_info["times_bare"] = ratio
    print(f"\n{ratio:.2f} times the bare runs, {benchmark.stats.stats.median:.2f} s")


@pytest.mark.parametrize("accumulation_steps", [2, 4, 8, 16])
def test_seconds_of_a_tiny_subject(benchmark, tmp_path, bare, accumulation_steps):
    """Torch is imported already, as in a test session."""
    subject = load_subject(str(bare.write_subject(tmp_path, *TINY, 16)))

    benchmark(bare.case, subject, accumulation_steps)


@pytest.mark.timeout(600)
def test_peak_memory_of_a_case(benchmark, tmp_path, bare):
    """Over the largest bare run: one float64 copy of gradients, parameters and two moments."""
    path = bare.write_subject(tmp_path, *LARGE, 16)

    def peak(what: str) -> float:
        command = [sys.executable, str(BENCH / "bare.py"), str(path), str(K), what]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return float(out.split()[1])

    largest = max(peak(role) for role in bare.ROLES)
    ours = benchmark.pedantic(peak, ("case",), rounds=1)

    benchmark.extra_info.update(case=ours, largest_run=largest)
    print(f"\n{ours:.0f} MB, {ours - largest:.0f} MB above the largest run")
