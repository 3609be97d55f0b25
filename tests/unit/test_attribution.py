"""Fitting the weights that build a gradient out of its pieces."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from equivcheck.attribution import predict, ratio, solve
from equivcheck.noise import SAFETY, UNIT_ROUNDOFF, allowed

DOUBLE = UNIT_ROUNDOFF[torch.float64]
COUNTS = st.integers(1, 12)
SEEDS = st.integers(0, 999)
TOKENS = (52, 60, 63, 56)


def pieces_of(count, coordinates, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, coordinates, generator=generator, dtype=torch.float64)


def weights_of(count, seed):
    return torch.randn(
        count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).tolist()


def assert_close(fit, expected, scales=None):
    """Every weight, times the scale of its piece, lies within the noise that the fit states."""
    assert fit.unique
    slack = SAFETY * fit.noise * max(map(abs, expected))
    scales = scales or [1.0] * len(expected)
    found = [value * scale for value, scale in zip(fit.values, scales, strict=True)]
    assert found == pytest.approx(expected, rel=0, abs=slack)
    assert fit.residual <= allowed(0.0, len(expected))


@given(COUNTS, st.integers(20, 300), SEEDS)
def test_weights_come_back(count, coordinates, seed):
    pieces, weights = pieces_of(count, coordinates, seed), weights_of(count, seed + 1)

    fit = solve(pieces, predict(pieces, weights))

    assert fit.rank == count
    assert_close(fit, weights)


@pytest.mark.parametrize(
    "weights",
    [
        [n / sum(TOKENS) for n in TOKENS],
        [1 / 4] * 4,
        [1.0] * 4,
        [0, 0, 0, TOKENS[3] / sum(TOKENS)],
        [n / (sum(TOKENS) + 1) for n in TOKENS],
        [0.001128, 0.010703, 0.10665, 0.989141],
    ],
    ids=["correct", "mean-of-means", "undivided", "zeroed", "one-too-many", "clipped"],
)
def test_the_known_faults_read_as_their_weights(weights):
    pieces = pieces_of(4, 500, 0)

    assert_close(solve(pieces, predict(pieces, weights)), weights)


@given(COUNTS, SEEDS, st.randoms(use_true_random=False))
def test_permuting_the_pieces_permutes_the_weights(count, seed, random):
    pieces, weights = pieces_of(count, 50, seed), weights_of(count, seed + 1)
    order = random.sample(range(count), count)

    fit = solve(pieces[order], predict(pieces, weights))

    assert_close(fit, [weights[k] for k in order])


@given(COUNTS, SEEDS, st.integers(-900, 900), st.integers(-900, 900))
def test_powers_of_two_change_weights_exactly(count, seed, first, second):
    pieces, target = pieces_of(count, 50, seed), pieces_of(1, 50, seed + 1)[0]
    assume(abs(second - first) < 900)
    scaled, plain = solve(pieces * 2.0**first, target * 2.0**second), solve(pieces, target)

    assert scaled.values == [value * 2.0 ** (second - first) for value in plain.values]
    assert (scaled.residual, scaled.rank, scaled.noise) == (plain.residual, plain.rank, plain.noise)


@given(st.integers(2, 64), st.integers(-40, 40), SEEDS)
def test_one_huge_piece_does_not_hide_the_others(count, exponent, seed):
    pieces, weights = pieces_of(count, 200, seed), weights_of(count, seed + 1)
    target = predict(pieces, weights)
    pieces[0] *= 2.0**exponent

    fit = solve(pieces, target)

    assert_close(fit, weights, scales=[2.0**exponent] + [1.0] * (count - 1))


@pytest.mark.parametrize("gap", [2.0**-10, 2.0**-20, 2.0**-27])
@pytest.mark.parametrize("count", [2, 64])
def test_nearly_collinear_pieces_are_still_told_apart(count, gap):
    pieces = pieces_of(count, 1000, 0)
    pieces[1] = pieces[0] + gap * pieces[1]
    weights = weights_of(count, 1)

    fit = solve(pieces, predict(pieces, weights))

    assert fit.rank == count
    assert_close(fit, weights)
    assert fit.noise > DOUBLE / gap


def test_a_duplicated_piece_leaves_only_its_own_weights_open():
    pieces = pieces_of(64, 1000, 0)
    pieces[40] = -3 * pieces[7]
    weights = weights_of(64, 1)

    fit = solve(pieces, predict(pieces, weights))

    assert fit.rank == 63
    assert not fit.unique
    assert [k for k, value in enumerate(fit.values) if value is None] == [7, 40]
    for value, weight in zip(fit.values, weights, strict=True):
        assert value is None or abs(value - weight) <= SAFETY * fit.noise * max(map(abs, weights))
    assert fit.residual <= allowed(0.0, 64)


def test_the_least_norm_solution_predicts_where_weights_are_open():
    pieces = pieces_of(4, 100, 0)
    pieces[3] = pieces[1]
    pieces[2] = 0.0
    target = predict(pieces, [1.0, 2.0, 3.0, 4.0])

    fit = solve(pieces, target)

    slack = SAFETY * fit.noise
    assert fit.solution == pytest.approx([1, 3, 0, 3], rel=slack)
    assert float((predict(pieces, fit.solution) - target).norm()) <= slack * float(target.norm())


def test_duplicates_up_to_the_rounding_of_a_control_are_duplicates():
    pieces = pieces_of(3, 1000, 0)
    pieces[2] = pieces[1] * (1 + 4 * DOUBLE * pieces_of(1, 1000, 1)[0])

    fit = solve(pieces, pieces[0])

    assert fit.rank == 2
    assert fit.values[1:] == [None, None]


def test_the_entry_noise_moves_the_threshold():
    pieces = pieces_of(2, 100, 0)
    pieces[1] = pieces[0] + 2.0**-30 * pieces[1]

    assert solve(pieces, pieces[0]).rank == 2
    assert solve(pieces, pieces[0], entry_noise=2.0**-25).rank == 1


@given(st.integers(2, 64), st.integers(1, 5), SEEDS)
def test_fewer_coordinates_than_pieces_determine_nothing(count, coordinates, seed):
    assume(coordinates < count)
    pieces, weights = pieces_of(count, coordinates, seed), weights_of(count, seed + 1)

    fit = solve(pieces, predict(pieces, weights))

    assert fit.rank <= coordinates
    assert not fit.unique
    assert None in fit.values


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_zero_and_non_finite_pieces_have_no_weight(bad):
    pieces, weights = pieces_of(4, 50, 0), [1.0, 0.0, 2.0, 3.0]
    pieces[1] = 0.0
    pieces[1, 3] = bad

    fit = solve(pieces, predict(pieces, weights))

    assert fit.values[1] is None
    assert [fit.values[k] for k in (0, 2, 3)] == pytest.approx([1, 2, 3], rel=SAFETY * fit.noise)
    assert fit.rank == 3


def test_a_zero_target_has_zero_weights_and_no_residual():
    fit = solve(pieces_of(3, 50, 0), torch.zeros(50, dtype=torch.float64))

    assert fit.values == [0.0, 0.0, 0.0]
    assert fit.residual == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_target_that_is_not_finite_has_nothing(bad):
    fit = solve(pieces_of(3, 2, 0), torch.tensor([bad, 1.0], dtype=torch.float64))

    assert (fit.values, fit.residual, fit.rank) == ([None] * 3, None, 0)


@pytest.mark.parametrize(("count", "coordinates"), [(0, 0), (0, 3), (3, 0)])
def test_nothing_explains_nothing(count, coordinates):
    target = torch.ones(coordinates, dtype=torch.float64)
    fit = solve(torch.zeros(count, coordinates, dtype=torch.float64), target)

    assert fit.values == [None] * count
    assert fit.rank == 0
    assert fit.residual == pytest.approx(float(coordinates > 0), rel=4 * DOUBLE)


def test_a_weight_too_large_for_a_number_is_none():
    tiny = torch.full((1, 3), 2.0**-1000, dtype=torch.float64)

    assert solve(tiny, 1 / tiny[0]).values == [None]


@given(st.integers(2, 8), SEEDS)
def test_the_residual_is_the_part_outside_the_span(count, seed):
    pieces = pieces_of(count, 50, seed)
    fit = solve(pieces[1:], pieces[0])
    inside = predict(pieces[1:], fit.values)

    outside = pieces[0] - inside
    assert fit.residual == pytest.approx(
        float(outside.norm() / pieces[0].norm()), rel=SAFETY * fit.noise
    )
    assert float((pieces[1:] @ outside).abs().max()) <= allowed(0.0, 50) * float(
        pieces.norm(dim=1).max() ** 2
    )


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)], ids=str)
def test_shapes_must_fit(shape):
    with pytest.raises(ValueError, match="expected"):
        solve(torch.zeros(shape, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))


def test_a_piece_without_weight_does_not_poison_the_prediction():
    pieces = torch.tensor([[1.0, 2.0], [math.nan, 1.0]], dtype=torch.float64)

    assert predict(pieces, [2.0, 0.0]).tolist() == [2.0, 4.0]
    assert predict(pieces, [0.0, 0.0]).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="1 weights for 2 pieces"):
        predict(pieces, [1.0])


@given(st.integers(-99_999, 99_999), st.integers(1, 99_999), st.integers(-8, 8))
def test_every_ratio_below_the_limit_is_found(numerator, denominator, error):
    exact = Fraction(numerator, denominator)
    x = float(exact) * (1 + error * DOUBLE)

    # p/q and p'/q' below 10**5 are at least 1 / (q q') > 10**-10 apart, far beyond this noise.
    assert ratio(x, 16 * DOUBLE) == exact


@given(st.floats(0.0625, 16), st.integers(4, 20))
def test_no_simpler_ratio_lies_within_the_noise(x, bits):
    noise = 2.0**-bits
    found = ratio(x, noise)

    assert found is not None
    assert abs(found - Fraction(x)) <= Fraction(x) * Fraction(noise)
    for denominator in range(1, min(found.denominator, 200)):
        nearest = Fraction(round(Fraction(x) * denominator), denominator)
        assert abs(nearest - Fraction(x)) > Fraction(x) * Fraction(noise)


@pytest.mark.parametrize(
    ("x", "noise", "expected"),
    [
        (math.pi, 16 * DOUBLE, None),
        (math.pi, 2.0**-10, Fraction(22, 7)),
        (-0.25, 0.0, Fraction(-1, 4)),
        (0.0, 0.0, Fraction(0)),
        (100_000.0, 0.0, None),
        (99_999.0, 0.0, Fraction(99_999)),
        (math.nan, 0.0, None),
        (math.inf, 0.0, None),
        (1.0, 1.0, None),
        (1.0, math.nan, None),
    ],
)
def test_ratios_by_hand(x, noise, expected):
    assert ratio(x, noise) == expected
