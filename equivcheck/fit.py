"""The weights that made the gradients of one cycle: both runs' gradients fitted by the pieces.

K micro-batches, n sampled coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from equivcheck.attribution import Weights, solve
from equivcheck.noise import coordinates
from equivcheck.recording import Kept, Step

T = TypeVar("T")

# Residuals of fits lie at 1e-15 for what is in the span and at 1e-3 and more for what is not.
BEYOND_ROUNDING = 1e-9


@dataclass
class Attribution:
    """Which weights made the gradients of one cycle.

    Attributes:
        step: Index of the candidate's step.
        matched: Index of the reference's step: the cycle.
        pieces: [K, n] float64, sampled coordinates of every micro-batch alone.
        reference, candidate: [n] float64.
        v, w: Fits of the two.
        names: Parameters in the order of the coordinates, with their length.
        weights_piece: [n] float64, the parameters themselves, where the reference needs them as a
            piece more: a penalty that is put into the gradients; else None.
        ordinals: Which backwards of every micro-step made the gradients, if not all did.
        ranks: R, if the ranks share the batch: the pieces are those of rank 0, then those of rank 1 ...
    """

    step: int
    matched: int
    pieces: torch.Tensor
    reference: torch.Tensor
    candidate: torch.Tensor
    v: Weights
    w: Weights
    names: list[tuple[str, int]]
    weights_piece: torch.Tensor | None = None
    ordinals: frozenset[int] | None = None
    ranks: int = 1

    @property
    def micro_steps(self) -> int:
        """Micro-batches of one rank in this cycle."""
        return self.pieces.shape[0] // self.ranks

    def by_rank(self, weights: Sequence[T]) -> list[list[T]]:
        """Return the weights of each rank's pieces."""
        k = self.micro_steps
        return [list(weights[r * k : (r + 1) * k]) for r in range(self.ranks)]

    def shaped(self, weights: Sequence[T]) -> list[Any]:
        """Return the weights as a result has them: a list of K, or R lists of K."""
        return self.by_rank(weights) if self.ranks > 1 else list(weights)

    def only(self, names: frozenset[str]) -> Attribution:
        """Return the fit over some parameters alone."""
        index, kept, begin = [], [], 0
        for name, length in self.names:
            if name in names:
                index.append(torch.arange(begin, begin + length))
                kept.append((name, length))
            begin += length
        chosen = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
        pieces, r, c = self.pieces[:, chosen], self.reference[chosen], self.candidate[chosen]
        return Attribution(
            self.step,
            self.matched,
            pieces,
            r,
            c,
            solve(pieces, r),
            solve(pieces, c),
            kept,
            ranks=self.ranks,
        )


def sampled(start: Kept | None) -> dict[str, torch.Tensor]:
    """Return the parameters that a step starts from, at the coordinates at which gradients are sampled."""
    if start is None:
        return {}
    begins = {**start.after, **start.begins}
    chosen = coordinates({name: tensor.numel() for name, tensor in begins.items()})
    found = {}
    for name, tensor in begins.items():
        flat, indices = tensor.flatten(), chosen[name]
        found[name] = (flat if indices is None else flat[indices]).to("cpu", torch.float64)
    return found


def attribute(
    step: Step,
    target: Step,
    pieces: Sequence[Step],
    weights: dict[str, torch.Tensor],
    ranks: int = 1,
) -> Attribution:
    """Return the weights of one cycle.

    Args:
        step: The candidate's step.
        target: The reference's, of the same samples.
        pieces: The steps that took each micro-batch alone.
        weights: The parameters that the cycle starts from, sampled.
        ranks: How many ranks share the batch; their pieces come one rank after the other.
    """
    names = [(name, len(s)) for name, s in target.sample.items() if s is not None]
    matrix = torch.stack([flat(piece, names) for piece in pieces])
    reference, candidate = flat(target, names), flat(step, names)
    assert step.matched is not None
    v, w, extra = solve(matrix, reference), solve(matrix, candidate), None
    if v.residual is not None and v.residual > BEYOND_ROUNDING:
        # A penalty on the weights, put into the gradients: the weights themselves are then a piece.
        theta = torch.cat([_or_zeros(weights.get(name), length) for name, length in names])
        with_theta = solve(torch.cat([matrix, theta[None]]), reference)
        if with_theta.residual is not None and with_theta.residual <= BEYOND_ROUNDING:
            k = matrix.shape[0]
            extra = theta
            v = replace(with_theta, values=with_theta.values[:k], solution=with_theta.solution[:k])
    parts = ranks if len(pieces) % ranks == 0 else 1
    return Attribution(
        step.index,
        step.matched,
        matrix,
        reference,
        candidate,
        v,
        w,
        names,
        weights_piece=extra,
        ranks=parts,
    )


def _or_zeros(tensor: torch.Tensor | None, length: int) -> torch.Tensor:
    return torch.zeros(length, dtype=torch.float64) if tensor is None else tensor


def flat(step: Step, names: Sequence[tuple[str, int]]) -> torch.Tensor:
    """Return [n] the gradients of a step at the sampled coordinates, zero where there is none."""
    parts = []
    for name, length in names:
        sample = step.sample.get(name)
        parts.append(torch.zeros(length, dtype=torch.float64) if sample is None else sample)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
