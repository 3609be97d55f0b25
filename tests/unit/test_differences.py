"""The sums that tell how far two tensors are apart."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equivcheck.differences import Sums, difference_of, sums, sums_many
from equivcheck.noise import UNIT_ROUNDOFF, gamma

# By name: the package also has a public function of this name.
measure = importlib.import_module("equivcheck.differences")

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = st.lists(st.integers(0, 7), max_size=4)
# Sums of n products, converted exactly: n + 1 roundings each, and both sides of a comparison err.
DOUBLE = UNIT_ROUNDOFF[torch.float64]


def bound(count):
    return 2 * gamma(count + 8, DOUBLE)


def random(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(reference, candidate):
    r, c = ([float(x) for x in t.reshape(-1).tolist()] for t in (reference, candidate))
    d = [b - a for a, b in zip(r, c, strict=True)]
    return (
        math.fsum(x * x for x in r),
        math.fsum(x * y for x, y in zip(r, d, strict=True)),
        math.fsum(x * x for x in d),
    )


def assert_sums(measured, reference, candidate):
    rr, rd, dd = exact(reference, candidate)
    slack = bound(reference.numel())
    assert measured.rr == pytest.approx(rr, rel=slack, abs=0)
    assert measured.rd == pytest.approx(rd, rel=0, abs=slack * math.sqrt(rr * dd))
    assert measured.dd == pytest.approx(dd, rel=slack, abs=0)
    assert measured.count == reference.numel()
    assert measured.finite


@given(SHAPES, st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.integers(0, 99))
def test_sums_are_those_of_exact_arithmetic(shape, first, second, seed):
    reference, candidate = random(shape, seed, first), random(shape, seed + 1, second)

    assert_sums(sums(reference, candidate), reference, candidate)


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sums_over_several_chunks(monkeypatch, dtype, equal):
    monkeypatch.setattr(measure, "_CHUNK", 100)
    reference = random((1234,), 0, dtype)
    candidate = reference.clone()
    if not equal:
        candidate[1200] += 1

    assert_sums(sums(reference, candidate), reference, candidate)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        ([3, -4, 5], [3, 4, 5]),
        ([True, False], [True, True]),
    ],
    ids=["integers", "booleans"],
)
def test_sums_of_what_is_no_float(reference, candidate):
    reference, candidate = torch.tensor(reference), torch.tensor(candidate)

    assert_sums(sums(reference, candidate), reference, candidate)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
def test_complex_numbers_are_pairs_of_reals(dtype):
    reference, candidate = (torch.view_as_complex(random((9, 2), n)).to(dtype) for n in (0, 1))
    real = [torch.view_as_real(x) for x in (reference, candidate.conj().resolve_conj())]

    assert sums(reference, candidate.conj()) == sums(*real)
    assert sums(reference, reference.real) == sums(
        torch.view_as_real(reference),
        torch.view_as_real(torch.complex(reference.real, 0 * reference.real)),
    )


@given(st.permutations(range(4)), st.permutations(range(4)), st.integers(0, 99))
def test_memory_layout_is_of_no_consequence(first, second, seed):
    reference, candidate = random((2, 3, 4, 5), seed), random((2, 3, 4, 5), seed + 1)
    strided = [
        x.permute(order).contiguous().permute([order.index(n) for n in range(4)])
        for x, order in ((reference, first), (candidate, second))
    ]

    assert_sums(sums(*strided), reference, candidate)


def test_a_view_with_gaps_counts_its_own_elements_only():
    reference, candidate = random((8, 6), 0), random((8, 6), 1)

    assert_sums(
        sums(reference[::2, 1:4], candidate[::2, 1:4]), reference[::2, 1:4], candidate[::2, 1:4]
    )
    assert_sums(sums(reference[:1].expand(8, 6), candidate), reference[:1].expand(8, 6), candidate)


def test_two_tensors_of_the_same_layout_are_not_copied():
    reference, candidate = (
        random((2, 3, 4, 5), n).contiguous(memory_format=torch.channels_last) for n in (0, 1)
    )

    left, right = measure._flat_pair(reference, candidate)

    assert left.data_ptr() == reference.data_ptr()
    assert right.data_ptr() == candidate.data_ptr()


def test_negated_views_are_resolved():
    reference = torch.view_as_complex(random((9, 2), 0)).conj().imag

    assert reference.is_neg()
    assert sums(reference, reference.clone()).dd == 0


def test_sparse_gradients_are_coalesced():
    indices = torch.tensor([[0, 2, 0]])
    sparse = torch.sparse_coo_tensor(indices, random((3, 4), 0), (5, 4), check_invariants=True)
    dense = sparse.to_dense()

    assert sums(sparse, dense) == sums(dense, dense)
    assert sums(dense, sparse * 2) == sums(dense, dense * 2)


def test_parameters_need_no_detach():
    weight = torch.nn.Parameter(random((3,), 0))

    assert sums(weight, weight * 2).relative == 1


def test_shapes_must_be_equal():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 2\)"):
        sums(torch.zeros(2, 3), torch.zeros(3, 2))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["reference", "candidate", "both"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_number_that_is_not_finite_is_seen(bad, where, dtype):
    tensors = {
        name: random((140_001,), n, dtype) for n, name in enumerate(("reference", "candidate"))
    }
    for name, tensor in tensors.items():
        if where in (name, "both"):
            tensor[-1] = bad

    measured = sums(**tensors)

    assert not measured.finite
    assert all(
        math.isnan(value) for name, value in difference_of(measured).items() if name != "count"
    )


def test_squares_that_overflow_are_not_finite():
    huge = torch.full((3,), 1e200, dtype=torch.float64)

    assert not sums(huge, huge).finite


@given(st.sampled_from(FLOATS[:2]), st.integers(0, 99))
def test_no_bits_differ_means_zero(dtype, seed):
    tensor = random((50,), seed, dtype)
    measured = sums(tensor, tensor.clone())

    assert (measured.relative, measured.scale, measured.difference_norm) == (0, 1, 0)
    assert measured.cosine == pytest.approx(1, abs=4 * DOUBLE)


def test_zeros_of_either_sign_are_equal():
    assert sums(torch.zeros(3), -torch.zeros(3)) == Sums(count=3)


@given(st.integers(-900, 900).filter(bool), st.integers(-60, 60), st.integers(0, 99))
def test_a_common_factor_changes_no_ratio(thousandths, exponent, seed):
    reference = random((40,), seed)
    candidate = reference * (thousandths / 100) + random((40,), seed + 1)
    plain, scaled = (
        sums(reference, candidate),
        sums(reference * 2.0**exponent, candidate * 2.0**exponent),
    )

    assert (plain.relative, plain.scale, plain.cosine) == (
        scaled.relative,
        scaled.scale,
        scaled.cosine,
    )


@given(st.floats(-1e3, 1e3).filter(lambda s: abs(s) * 1000 > 1), st.integers(0, 99))
def test_a_factor_shows_in_scale_and_not_in_cosine(factor, seed):
    reference = random((40,), seed)
    measured = sums(reference, reference * factor)
    # d = (s - 1) r cancels where s is small: errors are relative to |r|, not to |c|.
    slack = bound(40) * (1 + 1 / abs(factor)) ** 2

    assert measured.scale == pytest.approx(factor, rel=slack)
    assert measured.cosine == pytest.approx(math.copysign(1, factor), abs=slack)
    assert measured.candidate_norm == pytest.approx(
        abs(factor) * measured.reference_norm, rel=slack
    )


def test_cosine_needs_two_directions():
    reference = random((40,), 0)

    assert math.isnan(sums(reference, 0 * reference).cosine)
    assert math.isnan(sums(0 * reference, reference).cosine)
    assert math.isnan(sums(reference, reference * DOUBLE).cosine)


def test_a_zero_reference_has_no_scale():
    zero, one = torch.zeros(3), torch.ones(3)

    assert sums(zero, zero).relative == 0
    assert sums(zero, one).relative == math.inf
    assert math.isnan(sums(zero, one).scale)


def test_tiny_float32_gradients_do_not_underflow():
    reference = torch.full((10,), 2.0**-100)

    assert sums(reference, 2 * reference).relative == 1


@given(st.integers(0, 60), st.integers(0, 99))
def test_sums_add_over_parts(cut, seed):
    reference, candidate = random((60,), seed), random((60,), seed + 1)
    total = sums(reference[:cut], candidate[:cut]) + sums(reference[cut:], candidate[cut:])

    assert_sums(total, reference, candidate)


def test_not_finite_stays_so_in_a_total():
    assert not (Sums() + Sums(rr=math.nan, finite=False)).finite


@given(st.lists(SHAPES, max_size=12), st.integers(0, 99))
def test_many_pairs_are_measured_as_each_alone(shapes, seed):
    pairs = [(random(s, seed, torch.float32), random(s, seed + n)) for n, s in enumerate(shapes)]

    for measured, (reference, candidate) in zip(sums_many(pairs), pairs, strict=True):
        assert_sums(measured, reference, candidate)


def test_many_pairs_of_every_size_and_kind(monkeypatch):
    monkeypatch.setattr(measure, "_CHUNK", 100)
    monkeypatch.setattr(measure, "_SMALL", 40)
    bad = torch.tensor([math.inf])
    pairs = [(random((n,), n), random((n,), n + 1)) for n in (30, 40, 0, 41, 35, 200)]

    measured = sums_many([*pairs, (bad, bad)])

    for one, (reference, candidate) in zip(measured[:-1], pairs, strict=True):
        assert_sums(one, reference, candidate)
    assert not measured[-1].finite
    assert sum((m.count for m in measured), 0) == 347


def test_many_pairs_may_have_overflowed():
    """What is not finite is seen in its own pair, without a warning: a test suite makes errors of those."""
    both = torch.tensor([math.inf, -math.inf])  # their sum is no number
    found = sums_many([(torch.ones(2), both), (torch.ones(2), torch.ones(2))])

    assert [each.finite for each in found] == [False, True]


def test_the_difference_is_json():
    measured = sums(torch.ones(4), 2 * torch.ones(4))

    assert json.loads(json.dumps(difference_of(measured))) == {
        "relative": 1.0,
        "scale": 2.0,
        "cosine": 1.0,
        "reference_norm": 2.0,
        "candidate_norm": 4.0,
        "difference_norm": 2.0,
        "count": 4,
    }


def test_the_number_of_threads_is_put_back():
    """A run measures on one thread, and leaves the user's number as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = sums(torch.ones(4), torch.zeros(4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)

    assert found.dd == 4.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_elements_outside_the_mask_leave_no_trace(bad):
    """Over more than one chunk, and whatever the elements that are left out hold."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(400, 500, generator=generator)
    c = r + 1e-3 * torch.randn(400, 500, generator=generator)
    mask = torch.rand(400, 500, generator=generator) > 0.1
    expected = sums(r[mask], c[mask])
    r[~mask] = bad

    found = sums(r, c, mask)

    assert found.count == expected.count == int(mask.sum())
    assert found.finite
    assert (found.rr, found.rd, found.dd) == pytest.approx(
        (expected.rr, expected.rd, expected.dd), rel=1e-13
    )
