"""Attribution: which weights build a gradient out of the pieces of its micro-batches.

Legend: K pieces, n coordinates, A the [n, K] matrix whose columns are the pieces scaled to norm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Final

import torch

from equivcheck.noise import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Weights", "predict", "ratio", "solve"]

_UNIT_ROUNDOFF: Final = UNIT_ROUNDOFF[torch.float64]

# A singular value counts as zero below RANK_FACTOR * max(K, n) * eps of the largest one. The
# product without the factor is LAPACK's and numpy's convention for a matrix whose entries are
# exact (Golub and Van Loan, Matrix Computations, 4th ed., sec. 5.4.1). Pieces come out of a
# backward pass and carry its rounding: the same rows in another order differ by 1e-16 to 1e-15
# (measured), which for small n is above max(K, n) * eps; one decade covers it.
RANK_FACTOR: Final = 10.0

# Relative rounding of the entries of a piece where the caller has not measured it: a few
# operations in a row, as a control of correct float64 code shows (1e-16 to 1e-15).
_ENTRY_NOISE: Final = 8 * _UNIT_ROUNDOFF


@dataclass(frozen=True)
class Weights:
    """The weights of a fit, and how far they can be trusted.

    Attributes:
        values: One weight per piece; None where it is not determined: the piece is zero or not
            finite, or another choice of weights gives the same gradient.
        residual: |target - sum of w_k p_k| / |target|, L2; 0.0 for a zero target, None for a
            target that is not finite.
        rank: Numerical rank of the scaled pieces.
        unique: Whether every weight is determined.
        noise: Relative error, in terms of the largest weights, that rounding alone gives them.
        solution: The weights of least norm, one per piece (0.0 for an unusable one): not unique
            where `values` has None, but they predict the target all the same.
    """

    values: list[float | None]
    residual: float | None
    rank: int
    unique: bool
    noise: float
    solution: list[float] = field(default_factory=list)


def solve(
    pieces: torch.Tensor, target: torch.Tensor, *, entry_noise: float = _ENTRY_NOISE
) -> Weights:
    """Fit the weights with which the pieces add up to the target.

    Args:
        pieces: Gradient of each micro-batch alone, [K, n] float64.
        target: Gradient to explain, [n] float64.
        entry_noise: Relative rounding of the pieces (L2), e.g. as the control measured it.

    Returns:
        The weights of least squares; see Weights for what is None.

    Raises:
        ValueError: The shapes are not [K, n] and [n].

    Notes:
        SVD of columns scaled to unit norm, never normal equations: with condition number 1e8 they
        err by 5 where the SVD errs by 3e-10 (measured). Scaling is by the largest entry first, so
        that neither huge nor tiny gradients over- or underflow.
        The error of the weights is e (2 c / cos t + c**2 tan t) to first order, with e the entry
        noise, c the condition number and sin t the residual (Golub and Van Loan, Matrix
        Computations, 4th ed., theorem 5.3.1). A weight is not unique if the null space has a part
        in it that is larger than what perturbing A by the threshold can make of 0 (Wedin's sin
        theorem, Stewart and Sun, Matrix Perturbation Theory, theorem V.4.4).
    """
    if pieces.ndim != 2 or target.shape != pieces.shape[1:]:
        message = (
            f"pieces of shape {tuple(pieces.shape)} and a target of shape {tuple(target.shape)};"
            " expected [K, n] and [n]"
        )
        raise ValueError(message)
    count = pieces.shape[0]
    if not bool(target.isfinite().all()):
        return Weights([None] * count, None, 0, unique=False, noise=math.inf)

    unit, scales = _scaled(pieces)
    goal, goal_scale = _scaled(target[None])
    usable = [k for k in range(count) if math.isfinite(scales[k]) and scales[k] > 0.0]
    matrix = unit[usable].T
    left, singular, right = torch.linalg.svd(matrix, full_matrices=False)

    largest = float(singular[0]) if len(singular) else 0.0
    eps = 2 * _UNIT_ROUNDOFF
    # |E| <= sqrt(K) * entry_noise for K unit columns, and no singular value moves by more (Weyl).
    threshold = largest * max(
        RANK_FACTOR * max(matrix.shape) * eps, math.sqrt(len(usable)) * entry_noise
    )
    rank = int((singular > threshold).sum())
    smallest = float(singular[rank - 1]) if rank else 1.0
    kept = right[:rank]
    solution = kept.T @ ((left[:, :rank].T @ goal[0]) / singular[:rank])
    # One step of refinement takes the rounding of the SVD out of the weights: at n = 65536 and
    # K = 64 their error falls from 1e-14 to 2e-16, the residual from 5e-15 to 4e-16 (measured).
    rest = goal[0] - matrix @ solution
    solution = solution + kept.T @ ((left[:, :rank].T @ rest) / singular[:rank])
    # 1 - |row of V|**2 is the squared part of a unit vector in the null space; projecting is
    # exact where subtracting from 1 would cancel.
    outside = (torch.eye(len(usable), dtype=pieces.dtype) - kept.T @ kept).norm(dim=0)
    touched = outside > threshold / smallest + RANK_FACTOR * max(1, len(usable)) * eps

    values: list[float | None] = [None] * count
    least_norm = [0.0] * count
    for index, k in enumerate(usable):
        value = float(solution[index]) * goal_scale[0] / scales[k]
        least_norm[k] = value if math.isfinite(value) else 0.0
        if not touched[index] and math.isfinite(value):
            values[k] = value
    residual = float((goal[0] - matrix @ solution).norm())
    condition = largest / smallest if rank else 1.0
    sine = min(residual, 1.0 - eps)
    cosine = math.sqrt(1.0 - sine * sine)
    noise = entry_noise * (2.0 * condition / cosine + condition**2 * sine / cosine)
    return Weights(
        values, residual, rank, unique=None not in values, noise=noise, solution=least_norm
    )


def _scaled(rows: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Return the rows scaled to norm 1 (zero rows stay zero), and their norms."""
    if rows.shape[1] == 0:
        return rows, [0.0] * rows.shape[0]
    peak = rows.abs().amax(dim=1, keepdim=True)
    shrunk = rows / torch.where(peak > 0, peak, 1.0)
    norm = shrunk.norm(dim=1, keepdim=True)
    unit = shrunk / torch.where(norm > 0, norm, 1.0)
    return unit, [float(value) for value in (peak * norm)[:, 0]]


def predict(pieces: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Return the gradient that these weights imply.

    A hypothesis is tested by its prediction, which needs no unique solution.

    Args:
        pieces: [K, n] float64.
        weights: K factors. A piece with weight 0 is left out, even if it is not finite.

    Returns:
        sum of w_k p_k, [n] float64.

    Raises:
        ValueError: The number of weights is not K.
    """
    if len(weights) != pieces.shape[0]:
        raise ValueError(f"{len(weights)} weights for {pieces.shape[0]} pieces")
    used = [k for k, weight in enumerate(weights) if weight != 0.0]
    factors = torch.tensor([weights[k] for k in used], dtype=pieces.dtype, device=pieces.device)
    return factors @ pieces[used]


def ratio(x: float, noise: float, limit: int = 100_000) -> Fraction | None:
    """Return the simplest fraction p/q that equals x within its noise.

    Args:
        x: The number to name, e.g. the scale between two gradients.
        noise: Relative error of x, at least 0.
        limit: Both |p| and q are below it.

    Returns:
        The fraction with the smallest denominator (and numerator) in [x - noise |x|,
        x + noise |x|], or None if it has p or q beyond the limit, x is not finite, or the noise
        leaves nothing of x (1 or more).

    Notes:
        Continued fractions, in exact arithmetic. A random number has such a fraction with
        probability of about 0.6 * noise * |p| * q, so a fit proves something only while that is
        small. Source: Hardy and Wright, An Introduction to the Theory of Numbers, sec. 10.15
        (best approximations) and theorem 331 (density of fractions).
    """
    if not math.isfinite(x) or not 0.0 <= noise < 1.0:
        return None
    exact, slack = Fraction(abs(x)), Fraction(abs(x)) * Fraction(noise)
    simplest = _simplest_between(exact - slack, exact + slack)
    if max(simplest.numerator, simplest.denominator) >= limit:
        return None
    return simplest if x >= 0.0 else -simplest


def _simplest_between(low: Fraction, high: Fraction) -> Fraction:
    """Return the fraction with the smallest denominator in [low, high], 0 <= low <= high."""
    whole: list[int] = []
    while True:
        floor = low.numerator // low.denominator
        if floor == low or floor + 1 <= high:
            result = Fraction(floor if floor == low else floor + 1)
            break
        whole.append(floor)
        low, high = 1 / (high - floor), 1 / (low - floor)
    for term in reversed(whole):
        result = term + 1 / result
    return result
