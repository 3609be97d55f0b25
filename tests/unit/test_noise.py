"""The limits on rounding noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equivcheck.noise import SAFETY, UNIT_ROUNDOFF, allowed, coordinates, gamma, growth

DOUBLE = UNIT_ROUNDOFF[torch.float64]
NAMES = st.text(st.characters(codec="ascii"), max_size=5)


@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [
        (torch.float64, -53),
        (torch.float32, -24),
        (torch.float16, -11),
        (torch.bfloat16, -8),
        (torch.float8_e4m3fn, -4),
        (torch.float8_e5m2, -3),
        (torch.complex64, -24),
    ],
    ids=str,
)
def test_unit_roundoff_is_half_the_gap_above_one(dtype, exponent):
    assert UNIT_ROUNDOFF[dtype] == 2.0**exponent


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_gamma_adds_up_as_lemma_3_3_states(first, second):
    assert gamma(first, DOUBLE) >= first * DOUBLE
    both = gamma(first, DOUBLE) + gamma(second, DOUBLE)
    assert both + math.prod((gamma(first, DOUBLE), gamma(second, DOUBLE))) <= gamma(
        first + second, DOUBLE
    ) * (1 + 8 * DOUBLE)


@pytest.mark.parametrize(("terms", "unit"), [(-1, DOUBLE), (2**8, 2.0**-8), (2, 0.75)])
def test_gamma_refuses_where_no_bound_exists(terms, unit):
    with pytest.raises(ValueError, match="no bound"):
        gamma(terms, unit)


@given(st.integers(1, 1000))
def test_growth_is_that_of_independent_errors(accumulation_steps):
    assert growth(accumulation_steps) ** 2 == pytest.approx(accumulation_steps, rel=4 * DOUBLE)


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_two_orders_of_one_sum_stay_within_what_is_allowed(count, seed):
    terms = np.random.default_rng(seed).standard_normal(count)
    total = math.fsum(terms)
    condition = math.fsum(abs(terms)) / abs(total)

    difference = abs(float(np.cumsum(terms)[-1]) - float(np.cumsum(terms[::-1])[-1]))

    assert difference <= allowed(0.0, count, condition) * abs(total)


@given(st.floats(0, 1), st.integers(1, 10**6), st.floats(1, 1e6))
def test_allowed_is_never_below_the_control(control, terms, condition):
    limit = allowed(control, terms, condition)

    assert limit >= SAFETY * control
    assert limit >= SAFETY * (gamma(terms, DOUBLE) * condition)
    assert limit <= allowed(control, 2 * terms, 2 * condition)


@given(st.dictionaries(NAMES, st.integers(0, 3000), max_size=8), st.integers(0, 4000))
def test_coordinates_are_a_sorted_sample_with_a_least_share(shapes, limit):
    sample = coordinates(shapes, limit)

    assert list(sample) == list(shapes)
    for name, numel in shapes.items():
        indices = sample[name]
        if indices is None:
            continue
        assert indices.dtype == torch.int64
        assert min(numel, 64) <= len(indices) < numel
        assert bool((indices.diff() > 0).all())
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < numel
    kept = sum(
        numel if sample[name] is None else len(sample[name]) for name, numel in shapes.items()
    )
    assert kept <= max(limit, sum(min(numel, 64) for numel in shapes.values()))


@given(st.dictionaries(NAMES, st.integers(0, 3000), max_size=8), st.integers(0, 9))
def test_coordinates_do_not_depend_on_the_order_of_parameters(shapes, seed):
    backwards = dict(reversed(shapes.items()))

    sample, again = coordinates(shapes, 500, seed), coordinates(backwards, 500, seed)

    for name in shapes:
        assert (sample[name] is None) == (again[name] is None)
        assert sample[name] is None or torch.equal(sample[name], again[name])


def test_coordinates_keep_everything_below_the_limit():
    assert coordinates({"weight": 60_000, "bias": 5_536}) == {"weight": None, "bias": None}


def test_coordinates_keep_small_parameters_whole_in_a_large_model():
    sample = coordinates({"weight": 10**11, "bias": 64, "scale": 1})

    assert sample["bias"] is None
    assert sample["scale"] is None
    assert len(sample["weight"]) == 65536 - 65


def test_coordinates_of_another_seed_differ():
    first, second = (coordinates({"w": 10**6}, 100, seed)["w"] for seed in (0, 1))

    assert not torch.equal(first, second)
