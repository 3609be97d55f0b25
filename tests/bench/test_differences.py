"""How fast tensors are measured; runs only where benchmarks are on (`make bench`)."""

from __future__ import annotations

import time

import pytest
import torch

from equivcheck.differences import sums, sums_many

# 400 MB of float32, the size at which memory decides and calls do not.
LARGE = 100_000_000


@pytest.fixture(autouse=True)
def _benchmarks_are_on(request):
    if not request.config.getoption("benchmark_enable"):
        pytest.skip("benchmarks are off; run `make bench`")
    # Deterministic mode fills fresh memory, which would be measured too.
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture(scope="module")
def large():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(LARGE, generator=generator)
    return reference, reference + torch.randn(LARGE, generator=generator) / 1024


def assert_close_seconds(pair):
    start = time.perf_counter()
    torch.testing.assert_close(*pair, rtol=1, atol=1)
    return time.perf_counter() - start


@pytest.mark.parametrize("case", ["different", "bitwise-equal"])
def test_sums_are_ten_times_as_fast_as_assert_close(benchmark, large, case):
    """Both in one run, so that the machine's load is the same; the better of each counts."""
    reference, candidate = large
    if case == "bitwise-equal":
        candidate = reference.clone()
    baseline = min(assert_close_seconds((reference, candidate)) for _ in range(3))

    benchmark.pedantic(sums, (reference, candidate), rounds=5, warmup_rounds=1)

    ratio = baseline / benchmark.stats.stats.min
    benchmark.extra_info["times_assert_close"] = ratio
    print(f"\n{case}: {ratio:.1f}x assert_close ({baseline:.3f} s)")
    assert ratio >= 10


def test_many_small_parameters_cost_microseconds_each(benchmark):
    """Five hundred parameters of 64 elements, as biases and norms have them."""
    pairs = [(torch.randn(64), torch.randn(64)) for _ in range(500)]
    start = time.perf_counter()
    for pair in pairs:
        sums(*pair)
    alone = time.perf_counter() - start

    benchmark(sums_many, pairs)

    ratio = alone / benchmark.stats.stats.median
    benchmark.extra_info["times_one_by_one"] = ratio
    print(f"\n500 pairs: {ratio:.1f}x one by one")
    assert ratio > 1
