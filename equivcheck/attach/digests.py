"""Recognise samples by what enters the model: one number per row.

A row's number does not depend on the dtype, on the batch it came in, or on trailing padding: integers are hashed
exactly, with padding (0, -100, what the attention mask leaves out, and the value that a batch's shorter rows end with)
counting for nothing; floating rows are projected on a few random directions and rounded to a part in ten thousand,
so that what a kernel rounds differently for another batch size is the same row still. Zeros count for nothing along
any dimension, and so do the infinities of an additive mask. A row of tokens has a second number, without its last
token: `ids[:, :-1]` of a padded batch cuts that of the longest row, and padding of the others.

A vector that merely numbers what stands in the batch (the graph of each node, the order of a packed sequence) says
nothing of a row, which has another number in a smaller batch.

N rows, L numbers in a row.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch

__all__ = ["LISTED", "Rule", "lists_in", "row_digests"]

Array = Any
Digest = tuple[int, int]

# Directions that a floating row is projected on, and the share of its norm that is told apart: two different rows agree
# by chance with probability 1e-12, and float64 noise of 1e-15 crosses a border with probability 1e-11.
_DIRECTIONS: Final = 3
_GRID: Final = 1e-4
# Keeps simple numbers, which lie on the grid, off its borders; the golden section is far from every fraction.
_OFFSET: Final = 0.381966
# Magnitudes beyond this are masks (the lowest number of float32, of float64, infinity), no data.
_MASKED: Final = 1e30
# Larger rows have their random directions made anew each time: 2**20 numbers are 32 MB of them.
_REMEMBERED: Final = 2**20
# The "dimension" of models that take a list of samples.
LISTED: Final = -1


@dataclass
class Rule:
    """Which tensors make up a row, and what they are padded with; the full batch's run finds it, the others follow.

    Attributes:
        paths: Tensors whose dimension 0 is the sample, by where they stand in the call; empty until it is known.
        padding: By path, the value that shorter rows end with; 0 where nothing is taken off.
        endings: By path, the values that rows ended with while nothing was taken off; of this run alone.
        row_length: Most entries of an integer row so far.
        forwards: Forwards before one backward, at most.
        axis: The dimension that is the sample: 0, or 1 in models that take time first; LISTED where an argument is a
            list of samples, each with tensors of its own shape.
    """

    paths: list[str] = field(default_factory=list)
    padding: dict[str, int] = field(default_factory=dict)
    row_length: int = 1
    forwards: int = 1
    axis: int = 0
    endings: dict[str, set[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the rule, JSON-ready."""
        return {
            "paths": self.paths,
            # What the full batch was not seen to pad is settled too: a micro-batch may look as if it were.
            "padding": {**dict.fromkeys(self.endings, 0), **self.padding},
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
    columns = _listed(named) if rule.axis == LISTED else _stacked(named, rule.axis)
    if rule.paths:
        columns = {path: column for path, column in columns.items() if path in rule.paths}
    if not columns:
        return []
    telling = {path: each for path, each in columns.items() if not _is_numbering(each)}
    if not rule.paths:
        telling = _of_one_length(telling or columns)
        found = _digests(telling, rule)
        if (
            len(set(found)) == 1 < len(found)
        ):  # They tell nothing: what numbers the rows is all there is.
            telling = _of_one_length(columns)
            found = _digests(telling, rule)
        rule.paths = list(telling)
        return found
    return _digests(_of_one_length(columns), rule)


Column = list[torch.Tensor]


def lists_in(paths: Sequence[str]) -> dict[str, int]:
    """Return the lists of tensors, or of what holds tensors, among a call's arguments: how many each holds."""
    found: dict[str, set[str]] = {}
    for path in paths:
        kind, argument, *inner = path.split(".")
        if inner and inner[0].isdigit():
            found.setdefault(f"{kind}.{argument}", set()).add(inner[0])
    return {name: len(each) for name, each in found.items()}


def _stacked(named: list[tuple[str, torch.Tensor]], axis: int) -> dict[str, Column]:
    """Return the tensors that have a dimension for the samples, that dimension first."""
    return {
        path: [tensor.movedim(axis, 0) if axis else tensor]
        for path, tensor in named
        if tensor.dim() > axis and not tensor.is_sparse
    }


def _listed(named: list[tuple[str, torch.Tensor]]) -> dict[str, Column]:
    """Return, for each place in the elements of a list, that of every element: a row each."""
    lists = lists_in([path for path, _ in named])
    found: dict[str, Column] = {}
    for path, tensor in named:
        kind, argument, *inner = path.split(".")
        if f"{kind}.{argument}" in lists and not tensor.is_sparse:
            found.setdefault(".".join([kind, argument, "*", *inner[1:]]), []).append(tensor[None])
    return found


def _is_numbering(column: Column) -> bool:
    """Return whether a vector counts 0, 1, 2, ... upwards, values repeated or not, or is an order of 0 ... N - 1."""
    vector = column[0]
    if len(column) > 1 or vector.dim() != 1 or len(vector) < 2 or vector.dtype == torch.bool:
        return False
    if vector.is_floating_point() or vector.is_complex():
        return False
    values = vector.detach().cpu().numpy()
    steps = np.diff(values)
    counts_up = values[0] == 0 and values[-1] > 0 and steps.min() >= 0 and steps.max() == 1
    return bool(counts_up or np.array_equal(np.sort(values), np.arange(len(values))))


def _of_one_length(columns: dict[str, Column]) -> dict[str, Column]:
    """Return the columns with as many rows as most have; the first ones' where that is a tie."""
    lengths = {path: sum(map(len, column)) for path, column in columns.items()}
    counts = Counter(lengths.values())
    rows = next(n for n in lengths.values() if counts[n] == max(counts.values()))
    return {path: column for path, column in columns.items() if lengths[path] == rows}


def _digests(columns: dict[str, Column], rule: Rule) -> list[Digest]:
    rows = sum(map(len, next(iter(columns.values()))))
    masks = next((c for path, c in columns.items() if path.endswith("attention_mask")), None)
    total, shorter = np.zeros(rows, dtype=np.uint64), np.zeros(rows, dtype=np.uint64)
    for path, column in columns.items():
        found, cut = [], []
        for place, tensor in enumerate(column):
            if tensor.is_floating_point() or tensor.is_complex():
                one = other = _floating(tensor)
            else:
                mask = masks[place] if masks and len(masks) == len(column) else None
                one, other = _whole(path, tensor, mask, rule)
            found.append(one)
            cut.append(other)
        salt = np.uint64(_mixed(np.array([_text(path)], dtype=np.uint64))[0] | np.uint64(1))
        total += _mixed(np.concatenate(found)) * salt
        shorter += _mixed(np.concatenate(cut)) * salt
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
    terms = _mixed(values.view(np.uint64)) * (_mixed(_places(tensor.shape[1:])) | np.uint64(1))
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
        known = rule.endings.setdefault(path, set())
        # Rows that were seen to end with it had it counted: they must not be others from now on.
        if value and value not in known and repeated.any() and (last != value).any():
            rule.padding[path] = value
        else:
            known.update(last.tolist())
    value = rule.padding.get(path, 0)
    if value:
        trailing = np.logical_and.accumulate((values == value)[:, ::-1], axis=1)[:, ::-1]
        values[trailing] = 0


def _floating(tensor: torch.Tensor) -> Array:
    """Return the hash of each row of a floating tensor: of its norm and its projections, rounded."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    shape = tensor.shape[1:]
    rows = tensor.detach().cpu().reshape(len(tensor), -1)
    # One image: what float64 was promoted from float32 is the same, what the working dtype holds less finely is not.
    rows = torch.nan_to_num(rows.double())
    rows = torch.where(rows.abs() < _MASKED, rows, 0.0)
    norms = rows.norm(dim=1)
    scaled = (rows @ _directions(shape).T) / norms.clamp_min(torch.finfo(torch.float64).tiny)[
        :, None
    ]
    logs = torch.where(norms > 0, norms, 1.0).log2()[:, None]
    numbers = torch.cat([scaled, logs, (norms > 0).double()[:, None]], dim=1)
    rounded = (numbers / _GRID + _OFFSET).round().to(torch.int64).numpy().copy()
    places = _mixed(np.arange(1, rounded.shape[1] + 1, dtype=np.uint64)) | np.uint64(1)
    return (_mixed(rounded.view(np.uint64)) * places).sum(axis=1, dtype=np.uint64)


def _places(shape: Sequence[int]) -> Array:
    """Return a number for every entry of a row, of its coordinates alone: a wider row has the same ones, and more."""
    found = np.zeros((), dtype=np.uint64)
    for size in shape or (1,):
        found = _mixed(found)[..., None] + np.arange(1, size + 1, dtype=np.uint64)
    return found.reshape(-1)


def _directions(shape: torch.Size) -> torch.Tensor:
    """Return the random directions, of ones and minus ones, for rows of a shape: [directions, L], float64."""
    return _remembered(shape) if shape.numel() <= _REMEMBERED else _made(shape)


def _made(shape: torch.Size) -> torch.Tensor:
    bits = _mixed(_places(shape))
    signs = np.stack([(bits >> np.uint64(13 * i + 7)) & np.uint64(1) for i in range(_DIRECTIONS)])
    return torch.from_numpy(signs.astype(np.float64) * 2.0 - 1.0)


_remembered = functools.lru_cache(maxsize=16)(_made)


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
