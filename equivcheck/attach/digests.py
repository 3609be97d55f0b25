"""Recognise samples by what enters the model: one number per row.

A row's number does not depend on the dtype, on the batch it came in, or on trailing padding: integers are hashed
exactly, with padding (0, -100, what the attention mask leaves out, and the value that a batch's shorter rows end with)
counting for nothing; floating rows are projected on a few random directions and rounded to a part in ten thousand,
so that what a kernel rounds differently for another batch size is the same row still. A row of tokens has a second
number, without its last token: `ids[:, :-1]` of a padded batch cuts that of the longest row, and padding of the others.

N rows, L numbers in a row.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

__all__ = ["Rule", "row_digests"]

Array = Any
Digest = tuple[int, int]

# Directions that a floating row is projected on, and the share of its norm that is told apart: two different rows agree
# by chance with probability 1e-12, and float64 noise of 1e-15 crosses a border with probability 1e-11.
_DIRECTIONS: Final = 3
_GRID: Final = 1e-4
# Keeps simple numbers, which lie on the grid, off its borders; the golden section is far from every fraction.
_OFFSET: Final = 0.381966


@dataclass
class Rule:
    """Which tensors make up a row, and what they are padded with; the full batch's run finds it, the others follow.

    Attributes:
        paths: Tensors whose dimension 0 is the sample, by where they stand in the call; empty until it is known.
        padding: By path, the value that shorter rows end with.
        row_length: Most entries of an integer row so far.
        forwards: Forwards before one backward, at most.
        axis: The dimension that is the sample: 0, or 1 in models that take time first.
    """

    paths: list[str] = field(default_factory=list)
    padding: dict[str, int] = field(default_factory=dict)
    row_length: int = 1
    forwards: int = 1
    axis: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the rule, JSON-ready."""
        return {
            "paths": self.paths,
            "padding": self.padding,
            "row_length": self.row_length,
            "forwards": self.forwards,
            "axis": self.axis,
        }


def row_digests(named: list[tuple[str, torch.Tensor]], rule: Rule) -> list[Digest]:
    """Return two numbers below 2**64 for each row that enters a model, [N]; empty if no tensor has rows.

    The first is the row's; the second is that of the row without its last token, the first again if there are none.

    Args:
        named: The tensors of the call, by where they stand in it; not under any dispatch mode.
        rule: Filled in at the first call, followed afterwards.
    """
    tensors = {
        path: tensor.movedim(rule.axis, 0) if rule.axis else tensor
        for path, tensor in named
        if tensor.dim() > rule.axis and not tensor.is_sparse
    }
    if rule.paths:
        tensors = {path: tensor for path, tensor in tensors.items() if path in rule.paths}
    if not tensors:
        return []
    counts = Counter(len(tensor) for tensor in tensors.values())
    most = max(counts.values())
    rows = next(len(t) for t in tensors.values() if counts[len(t)] == most)
    tensors = {path: tensor for path, tensor in tensors.items() if len(tensor) == rows}
    if not rule.paths:
        rule.paths = list(tensors)
    mask = next((t for path, t in tensors.items() if path.endswith("attention_mask")), None)
    total, shorter = np.zeros(rows, dtype=np.uint64), np.zeros(rows, dtype=np.uint64)
    for path, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            found = cut = _floating(tensor)
        else:
            found, cut = _whole(path, tensor, mask, rule)
        salt = np.uint64(_mixed(np.array([_text(path)], dtype=np.uint64))[0] | np.uint64(1))
        total += _mixed(found) * salt
        shorter += _mixed(cut) * salt
    return [(int(a), int(b)) for a, b in zip(total, shorter, strict=True)]


def _whole(
    path: str, tensor: torch.Tensor, mask: torch.Tensor | None, rule: Rule
) -> tuple[Array, Array]:
    """Return the hash of each row of an integer tensor, zeros counting for nothing; and without its last token."""
    values = tensor.detach().to(torch.int64).cpu().reshape(len(tensor), -1).numpy().copy()
    if tensor.dim() == 2:
        rule.row_length = max(rule.row_length, tensor.shape[1])
    values[values == -100] = 0
    if mask is not None and mask.shape == tensor.shape and mask.dim() == 2:
        values[mask.detach().cpu().numpy() == 0] = 0
    elif tensor.dim() == 2 and tensor.shape[1] > 1:
        _strip(path, values, rule)
    places = _mixed(np.arange(1, values.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    terms = _mixed(values.view(np.uint64)) * places
    whole = terms.sum(axis=1, dtype=np.uint64)
    if tensor.dim() != 2 or not values.shape[1]:
        return whole, whole
    last = values.shape[1] - 1 - np.argmax((values != 0)[:, ::-1], axis=1)
    return whole, whole - terms[np.arange(len(terms)), last]


def _strip(path: str, values: Array, rule: Rule) -> None:
    """Set trailing padding to 0: the value with which some rows end several times over and others do not end."""
    if path not in rule.padding:
        last = values[:, -1]
        value = int(Counter(last.tolist()).most_common(1)[0][0])
        repeated = (last == value) & (values[:, -2] == value)
        if value and repeated.any() and (last != value).any():
            rule.padding[path] = value
    value = rule.padding.get(path, 0)
    if value:
        trailing = np.logical_and.accumulate((values == value)[:, ::-1], axis=1)[:, ::-1]
        values[trailing] = 0


def _floating(tensor: torch.Tensor) -> Array:
    """Return the hash of each row of a floating tensor: of its norm and its projections, rounded."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    rows = tensor.detach().cpu().reshape(len(tensor), -1)
    # One image: what float64 was promoted from float32 is the same, what the working dtype holds less finely is not.
    rows = torch.nan_to_num(rows.double())
    bits = _mixed(np.arange(1, rows.shape[1] + 1, dtype=np.uint64))
    signs = np.stack([(bits >> np.uint64(13 * i + 7)) & np.uint64(1) for i in range(_DIRECTIONS)])
    directions = torch.from_numpy(signs.astype(np.float64) * 2.0 - 1.0)
    norms = rows.norm(dim=1)
    scaled = (rows @ directions.T) / norms.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    logs = torch.where(norms > 0, norms, 1.0).log2()[:, None]
    numbers = torch.cat([scaled, logs, (norms > 0).double()[:, None]], dim=1)
    rounded = (numbers / _GRID + _OFFSET).round().to(torch.int64).numpy().copy()
    places = _mixed(np.arange(1, rounded.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (_mixed(rounded.view(np.uint64)) * places).sum(axis=1, dtype=np.uint64)


def _mixed(values: Array) -> Array:
    """Spread every bit over all 64; 0 stays 0. Source: the finalizer of splitmix64 (Steele, Lea, Flood, 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _text(path: str) -> int:
    """Return a number for a name, the same in every process."""
    found = 1469598103934665603
    for byte in path.encode():
        found = (found ^ byte) * 1099511628211 % 2**64
    return found
