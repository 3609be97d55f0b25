"""How far two tensors are apart: three sums in float64, from which all numbers follow.

Legend: r reference, c candidate, d = c - r.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from equivcheck.noise import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["Sums", "dense", "difference_of", "far_apart", "sums", "sums_many"]

# Elements in a chunk on the cpu: its two float64 buffers (2 MB) stay in cache. Measured on two
# float32 tensors of 400 MB, one thread, seconds: 32 Ki 0.23, 64 Ki 0.18, 128 Ki 0.14.
_CHUNK: Final = 128 * 1024

# On an accelerator a kernel launch costs microseconds and memory is the only limit: buffers of
# 256 MB.
_DEVICE_CHUNK: Final = 16 * 1024 * 1024

# Pairs up to this size are flattened into one buffer: below it the calls cost more than the
# arithmetic.
_SMALL: Final = 16 * 1024

_INTEGER_OF_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Sums:
    """Sums over the elements of a pair of tensors; add them to measure several pairs as one.

    Attributes:
        rr: Sum of r**2.
        rd: Sum of r * d.
        dd: Sum of d**2.
        count: Number of real numbers compared; a complex one counts twice.
        finite: Whether all three sums are finite: no inf or nan came in, and no square overflowed
            (beyond 1e154, in float64 only).
    """

    rr: float = 0.0
    rd: float = 0.0
    dd: float = 0.0
    count: int = 0
    finite: bool = True

    def __add__(self, other: Sums) -> Sums:
        """Return the sums over the elements of both."""
        return Sums(
            self.rr + other.rr,
            self.rd + other.rd,
            self.dd + other.dd,
            self.count + other.count,
            self.finite and other.finite,
        )

    @property
    def relative(self) -> float:
        """|d| / |r|; 0.0 if both are zero, inf if only r is, nan if not finite."""
        if not self.finite:
            return math.nan
        if self.rr > 0.0:
            return math.sqrt(self.dd / self.rr)
        return math.inf if self.dd > 0.0 else 0.0

    @property
    def scale(self) -> float:
        """The factor s with the least |c - s r|; nan if r is zero or a sum not finite."""
        return 1.0 + self.rd / self.rr if self.finite and self.rr > 0.0 else math.nan

    @property
    def cosine(self) -> float:
        """The cosine of the angle between r and c, in [-1, 1].

        It is nan if a sum is not finite, r is zero, or c is too small beside r to have a
        direction in these sums: |c| below about 1e-8 |r|, where c = r + d cancels.
        """
        if not self.finite or self._candidate_square <= _CANCELLED * self.rr:
            return math.nan
        if self.rr <= 0.0:
            return math.nan
        cosine = (self.rr + self.rd) / (self.reference_norm * self.candidate_norm)
        return max(-1.0, min(1.0, cosine))

    @property
    def reference_norm(self) -> float:
        """|r|, L2; nan if not finite."""
        return math.sqrt(self.rr) if self.finite else math.nan

    @property
    def candidate_norm(self) -> float:
        """|c|, L2, to about 1e-8 |r| absolute; nan if not finite."""
        return math.sqrt(self._candidate_square) if self.finite else math.nan

    @property
    def difference_norm(self) -> float:
        """|d|, L2; nan if not finite."""
        return math.sqrt(self.dd) if self.finite else math.nan

    @property
    def _candidate_square(self) -> float:
        return max(0.0, self.rr + 2.0 * self.rd + self.dd)


# |c|**2 = rr + 2 rd + dd errs by a few roundings of its largest term: 16 allow for the four
# operations and the sums themselves.
_CANCELLED: Final = 16 * UNIT_ROUNDOFF[torch.float64]


def sums(
    reference: torch.Tensor, candidate: torch.Tensor, mask: torch.Tensor | None = None
) -> Sums:
    """Measure a pair of tensors in one pass.

    Args:
        reference: Any shape S, dtype, layout and device.
        candidate: Shape S; dtype and layout may differ.
        mask: Shape S, bool: the elements to measure; None for all of them.

    Returns:
        Sums over the elements.

    Raises:
        ValueError: The shapes differ.

    Notes:
        Every element is converted to float64 first, so that small gradients do not underflow and
        the result is exact to about 1e-15 whatever the dtype (integers above 2**53 excepted).
        Complex numbers are pairs of reals. Chunks that are bitwise equal are recognised before
        any arithmetic. O(numel) time; temporaries of 2 MB on the cpu, unless the two tensors lie
        differently in memory or are not dense.
    """
    with _one_thread():
        return _sums(reference, candidate, mask)


def _sums(
    reference: torch.Tensor, candidate: torch.Tensor, mask: torch.Tensor | None = None
) -> Sums:
    if mask is None:
        left, right = _flat_pair(reference, candidate)
        left_out = None
    else:
        # One order of elements for all three.
        left, right, mask = (
            each.reshape(-1) for each in (*map(_plain, (reference, candidate)), mask)
        )
        left_out = mask.logical_not()
    chunk = _CHUNK if left.device.type == "cpu" else _DEVICE_CHUNK
    total = torch.zeros(3, dtype=torch.float64, device=left.device)
    part = torch.zeros_like(total)
    into = part.unbind()
    size = min(chunk, left.numel())
    r_buffer = torch.empty(size, dtype=torch.float64, device=left.device)
    d_buffer = torch.empty_like(r_buffer)
    for start in range(0, left.numel(), chunk):
        r_chunk, c_chunk = left[start : start + chunk], right[start : start + chunk]
        out = None if left_out is None else left_out[start : start + chunk]
        r = r_buffer[: r_chunk.numel()].copy_(r_chunk)
        if out is not None:
            r.masked_fill_(out, 0.0)
        torch.dot(r, r, out=into[0])
        if _bitwise_equal(r_chunk, c_chunk):
            total[0] += into[0]
            continue
        d = d_buffer[: r_chunk.numel()].copy_(c_chunk).sub_(r)
        if out is not None:
            d.masked_fill_(out, 0.0)
        torch.dot(r, d, out=into[1])
        torch.dot(d, d, out=into[2])
        total += part
    count = left.numel() if left_out is None else left.numel() - int(left_out.sum())
    return _of(total.tolist(), count)


def far_apart(reference: torch.Tensor, candidate: torch.Tensor, share: float) -> torch.Tensor:
    """Return which elements differ by more than a share of the reference's.

    Args:
        reference: Any shape S, floating dtype.
        candidate: Shape S.
        share: Relative to each element of the reference.

    Returns:
        Shape S, bool, contiguous: |d| > share |r|. False where either is nan.

    Notes:
        A chunk at a time, so that the temporaries are small beside the tensors.
    """
    found = torch.empty(reference.shape, dtype=torch.bool, device=reference.device)
    candidate = candidate.to(reference.device)
    flat = (reference.reshape(-1), candidate.reshape(-1), found.view(-1))
    with _one_thread():
        for r, c, out in zip(*(torch.split(each, _CHUNK) for each in flat), strict=True):
            torch.gt((c - r).abs_(), r.abs().mul_(share), out=out)
    return found


def sums_many(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[Sums]:
    """Measure many pairs, small ones together.

    Args:
        pairs: (reference, candidate) as in sums.

    Returns:
        The Sums of each pair, in order.

    Raises:
        ValueError: The shapes of a pair differ.
    """
    flat = [_flat_pair(reference, candidate) for reference, candidate in pairs]
    results = [Sums()] * len(flat)
    small = []
    for index, (left, right) in enumerate(flat):
        if left.device.type != "cpu" or left.numel() > _SMALL:
            results[index] = sums(left, right)
        elif left.numel():
            small.append(index)
    for group in _groups(small, [left.numel() for left, _ in flat]):
        for index, result in zip(group, _grouped([flat[index] for index in group]), strict=True):
            results[index] = result
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread, as many as memory needs.

    A chunk is too short a task to be shared: on two threads beside another busy process each call
    waits for a time slice, 3 ms for a dot of 128 Ki elements that takes 0.05 (measured).
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a strided gradient as it is, and a sparse one as a dense one of float64.

    A sparse gradient lists every use of a row of an embedding; their sum is taken when it is
    coalesced, in the full batch as when accumulated, so that its rounding is no loss of
    accumulating. In float32 it would look like one: 17 rows used 1024 times round by 10 units.
    """
    return tensor.to(torch.float64).to_dense() if tensor.is_sparse else tensor


def difference_of(measured: Sums) -> dict[str, Any]:
    """Return the numbers of a difference as they stand in a result.

    Args:
        measured: Sums over one tensor or many.

    Returns:
        relative, scale, cosine, the three norms (floats, which may be inf or nan) and count.
    """
    return {
        "relative": measured.relative,
        "scale": measured.scale,
        "cosine": measured.cosine,
        "reference_norm": measured.reference_norm,
        "candidate_norm": measured.candidate_norm,
        "difference_norm": measured.difference_norm,
        "count": measured.count,
    }


def _of(values: Sequence[float], count: int) -> Sums:
    """Return rr, rd, dd as Sums; any non-finite element makes one of them non-finite."""
    rr, rd, dd = values
    return Sums(rr, rd, dd, count, finite=all(map(math.isfinite, values)))


def _flat_pair(
    reference: torch.Tensor, candidate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both as one-dimensional real strided tensors on one device, views where possible."""
    if reference.shape != candidate.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(candidate.shape)}")
    left, right = _plain(reference), _plain(candidate).to(reference.device)
    if left.is_complex() or right.is_complex():
        left, right = (
            torch.view_as_real((x if x.is_complex() else x.to(torch.complex128)).resolve_conj())
            for x in (left, right)
        )
    if not (left.is_contiguous() and right.is_contiguous()):
        # The order of the elements is of no consequence, so take the order of the memory.
        order = sorted(range(left.ndim), key=left.stride, reverse=True)
        left, right = left.permute(order), right.permute(order)
    return left.reshape(-1), right.reshape(-1)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor without graph and as a dense one."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        return tensor.to_dense()
    return tensor.resolve_neg()


def _bitwise_equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether two flat chunks on the cpu have the same bits; False where that costs."""
    if left.dtype != right.dtype or left.device.type != "cpu":
        return False
    dtype = _INTEGER_OF_SIZE[left.element_size()]
    bits = left.view(dtype).numpy(), right.view(dtype).numpy()
    # numpy compares all elements, at 13 GB/s, before it looks at the first; different chunks
    # usually differ at once.
    return np.array_equal(bits[0][:64], bits[1][:64]) and np.array_equal(*bits)


def _groups(indices: Iterable[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Collect indices into groups of about a chunk."""
    group: list[int] = []
    held = 0
    for index in indices:
        if held + sizes[index] > _CHUNK:
            yield group
            group, held = [], 0
        group.append(index)
        held += sizes[index]
    if group:
        yield group


def _grouped(flat: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[Sums]:
    """Measure non-empty flat pairs on the cpu in one go."""
    sizes = [left.numel() for left, _ in flat]
    starts = np.cumsum([0, *sizes[:-1]])
    r = torch.empty(sum(sizes), dtype=torch.float64)
    d = torch.empty_like(r)
    torch._foreach_copy_(torch.split(r, sizes), [left for left, _ in flat])
    torch._foreach_copy_(torch.split(d, sizes), [right for _, right in flat])
    d -= r
    with np.errstate(invalid="ignore"):  # gradients that overflowed: the sums are nan, and said so
        columns = [
            np.add.reduceat((x * y).numpy(), starts).tolist() for x, y in ((r, r), (r, d), (d, d))
        ]
    return [_of(values, size) for *values, size in zip(*columns, sizes, strict=True)]
