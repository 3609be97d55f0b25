"""Rounding noise: what correct code may show, with the source of every number.

Nothing here is tuned to a test. A limit is either measured (the control run) or follows from
the unit roundoff of a dtype and a count of operations.

Legend: K accumulation steps, n terms of a sum, u unit roundoff.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "SAFETY",
    "UNIT_ROUNDOFF",
    "allowed",
    "coordinates",
    "floor",
    "gamma",
    "growth",
]

# Half the distance from 1 to the next number: the largest relative error of one operation with
# rounding to nearest. Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
# sec. 2.1 and theorem 2.2. A complex number is a pair of reals and rounds like them.
UNIT_ROUNDOFF: Final[dict[torch.dtype, float]] = {
    dtype: torch.finfo(dtype).eps / 2
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.complex128,
        torch.complex64,
        torch.complex32,
    )
}

# How far the measured noise of one permutation may lie below what another order of the same sums
# shows. Two decades: over 384 correct cases up to K = 128 no tensor's difference exceeds 4 times
# its control's, nor 0.12 gamma(n, u) (tests/bench/calibrate.py), and the smallest planted fault is
# 1e-6, so a decade more or less changes no verdict.
SAFETY: Final = 100.0

# How many unit roundoffs times the growth in K accumulating may lose. Correct code measures at
# most 0.38 with float32 or bfloat16 parameters and 0.97 with float64 ones, at any K from 2 to 128
# (tests/bench/calibrate.py); a bfloat16 buffer under float32 parameters 19,000 at the least, and a
# float16 one is 8 times finer. Eight lies far from both.
UNITS: Final = 8.0

# A parameter below this size is kept whole when coordinates are sampled: fits per parameter need
# more coordinates than pieces, and K = 64 is the largest case in the test matrix.
_LEAST_SAMPLE: Final = 64


def gamma(terms: int, unit_roundoff: float) -> float:
    """Return the relative error that a sum of so many rounded operations cannot exceed.

    Args:
        terms: Number n of rounded operations in a row, at least 0.
        unit_roundoff: Unit roundoff u of the arithmetic, see UNIT_ROUNDOFF.

    Returns:
        n u / (1 - n u), at least n u.

    Raises:
        ValueError: n u reaches 1: no bound exists.

    Notes:
        Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., lemma 3.1.
    """
    product = terms * unit_roundoff
    if terms < 0 or product >= 1.0:
        raise ValueError(f"no bound for {terms} operations with unit roundoff {unit_roundoff:g}")
    return product / (1.0 - product)


def growth(accumulation_steps: int) -> float:
    """Return by how many unit roundoffs accumulating K gradients is expected to err.

    Args:
        accumulation_steps: K, at least 1.

    Returns:
        sqrt(K), in units of the unit roundoff of the accumulator.

    Notes:
        The worst case of K additions is (K - 1) u; rounding errors are close to independent with
        mean zero, and then grow with the square root. Measured with float32 and bfloat16
        parameters: 0.36 sqrt(K) u at K = 2 and 0.29 to 0.38 sqrt(K) u at K = 128.
        Source: Higham and Mary, A new approach to probabilistic rounding error analysis,
        SIAM J. Sci. Comput. 41(5), 2019, theorem 2.4.
    """
    return math.sqrt(accumulation_steps)


def allowed(control: float, terms: int, condition: float = 1.0) -> float:
    """Return the relative difference that correct float64 code may show.

    A control measures the noise of the very code under test, but can be exactly zero by luck; the
    limit is therefore never below what float64 sums over that many terms can give.

    Args:
        control: Relative difference between reference and control, at least 0.
        terms: Length n of the longest sum behind the numbers compared (samples times tokens).
        condition: sum of |x_i| over |sum of x_i|, at least 1: how much of the sum cancels.

    Returns:
        max(SAFETY * control, SAFETY * gamma(n, 2**-53) * condition).

    Notes:
        Two orders of one sum each lie within gamma(n - 1, u) * sum |x_i| of the exact sum, in any
        order of summation, so they differ by at most twice that, and relative to the sum itself
        by 2 gamma(n - 1, u) * condition. A backward pass chains a few dozen such sums (one
        matrix product per layer), whose relative errors add to first order: SAFETY covers
        the factor 2 and about 50 of them.
        Source: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sec. 4.2.
    """
    floor = gamma(terms, UNIT_ROUNDOFF[torch.float64]) * condition
    return SAFETY * max(control, floor)


def floor(terms: int, unit_roundoff: float, accumulation_steps: int = 1) -> float:
    """Return the relative difference that correct code may show, however small its control is.

    Args:
        terms: Length n of the longest sum behind the numbers compared, at least 1.
        unit_roundoff: Unit roundoff u of the lowest precision that computed.
        accumulation_steps: K, at least 1.

    Returns:
        SAFETY * gamma(n, u) where u is that of float32 or finer; below that
        SAFETY * gamma(n, 2**-24) + UNITS * sqrt(K) * u.

    Notes:
        Kernels that take bfloat16 or float16 operands form their sums in float32 (the accumulate
        type of aten/src/ATen/AccumulateType.h) and round the result once, so that n does not
        multiply u: 300 rows of bfloat16 would otherwise allow any difference at all.
    """
    fine = min(unit_roundoff, UNIT_ROUNDOFF[torch.float32])
    result = SAFETY * gamma(terms, fine)
    if unit_roundoff > fine:
        result += UNITS * growth(accumulation_steps) * unit_roundoff
    return result


def coordinates(
    shapes: Mapping[str, int], limit: int = 65536, seed: int = 0
) -> dict[str, torch.Tensor | None]:
    """Choose a fixed sample of coordinates of every parameter, so that pieces need not be whole.

    The fit has K unknowns, so a few thousand coordinates determine it as well as a billion do.

    Args:
        shapes: Number of elements by parameter name. Its order is of no consequence.
        limit: Number of elements up to which everything is kept. The sample exceeds it only
            where that is needed to give each parameter its least share.
        seed: Another seed gives another sample.

    Returns:
        For every name the sorted, distinct indices into the flattened parameter (int64, cpu), or
        None where all elements are kept. Each parameter has at least min(numel, 64) of them, and
        the rest is given out in proportion to the sizes.

    Notes:
        Stratified: one index drawn from each of equally long runs, in O(sample) time and memory
        however large the parameter is (a random permutation would be as long as the parameter).
    """
    total = sum(shapes.values())
    if total <= limit:
        return dict.fromkeys(shapes)
    least = {name: min(numel, _LEAST_SAMPLE) for name, numel in shapes.items()}
    rest = max(0, limit - sum(least.values()))
    left = total - sum(least.values())
    return {
        name: _stratified(
            numel, least[name] + rest * (numel - least[name]) // max(1, left), name, seed
        )
        for name, numel in shapes.items()
    }


def _stratified(numel: int, count: int, name: str, seed: int) -> torch.Tensor | None:
    """Return `count` sorted distinct indices below `numel`, or None for all of them."""
    if count >= numel:
        return None
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    edges = torch.arange(count + 1, dtype=torch.int64) * numel // count
    width = edges.diff()
    drawn = torch.rand(count, generator=generator, dtype=torch.float64)
    return edges[:-1] + (drawn * width).to(torch.int64)
