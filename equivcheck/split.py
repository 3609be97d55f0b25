"""Cutting full batches into micro-batches, and putting them together again.

Legend: B rows of a full batch, K accumulation steps, R ranks.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equivcheck.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = [
    "block_permutation",
    "cut",
    "join",
    "named_tensors",
    "plan",
    "rows_of",
    "take",
    "tensors_in",
    "walk",
]


def cut(rows: int, parts: int, split: str) -> list[int]:
    """Return the sizes of the slices of so many rows.

    Args:
        rows: B, at least `parts`.
        parts: K, at least 1.
        split: "even" (B/K rows, the first B mod K slices with one more) or "uneven" (in
            proportion to 1, 2, ..., K by largest remainder, at least one row each).

    Returns:
        K sizes of at least 1, with sum B.

    Raises:
        UsageError: Fewer rows than parts, no parts, or another split.
    """
    if parts < 1 or rows < parts:
        raise UsageError(
            f"{rows} rows cannot be cut into {parts} micro-batches",
            expected="at least one row in each of at least one micro-batch",
        )
    if split == "even":
        return [rows // parts + (part < rows % parts) for part in range(parts)]
    if split != "uneven":
        raise UsageError(f"unknown split {split!r}", expected="even or uneven")
    # One row each first, and the rest in proportion: that keeps the sum exact without repair.
    rest, whole = rows - parts, parts * (parts + 1) // 2
    ideal = [max(0, rows * (part + 1) - whole) for part in range(parts)]
    total = sum(ideal) or 1
    sizes = [1 + rest * share // total for share in ideal]
    by_remainder = sorted(range(parts), key=lambda part: (-(rest * ideal[part] % total), -part))
    for part in by_remainder[: rows - sum(sizes)]:
        sizes[part] += 1
    return sizes


def plan(
    batch_rows: Sequence[int],
    accumulation_steps: int,
    split: str,
    world_size: int = 1,
    every_rank_all: bool = False,
) -> list[list[list[tuple[int, int]]]]:
    """Lay out which rows of each full batch each rank consumes in each micro-step.

    Args:
        batch_rows: Rows of each full batch, in order.
        accumulation_steps: K.
        split: "even" or "uneven", see cut.
        world_size: R.
        every_rank_all: Every rank consumes all samples (pipeline and tensor parallelism),
            instead of a contiguous share.

    Returns:
        [cycle][rank][micro_step] = (start, stop), rows of that full batch. Every cycle has K
        micro-batches per rank. Only a last full batch that is shorter than all the others (the
        tail) is cut at the micro-batch sizes of the one before it, and may have fewer; the same
        number on every rank.

    Raises:
        UsageError: A full batch has fewer rows than K * R, the tail fewer rows than ranks, or K,
            R or the split is not valid.

    Notes:
        Shares of the tail differ by at most one row. Where the equal number of micro-batches
        asks for it, a slice of the tail is shorter than usual, or (micro-batches of a single row)
        the last one of a rank a row longer.
    """
    if world_size < 1:
        raise UsageError(f"world_size is {world_size}", expected="at least 1")
    shares = 1 if every_rank_all else world_size
    has_tail = len(batch_rows) > 1 and batch_rows[-1] < min(batch_rows[:-1])
    cycles: list[list[list[int]]] = []
    for index, rows in enumerate(batch_rows):
        if has_tail and index == len(batch_rows) - 1:
            cycles.append(_tail(index, rows, cycles[-1]))
            continue
        if rows < accumulation_steps * shares:
            most = rows // shares
            ranks = f" * world_size={shares}" if shares > 1 else ""
            message = (
                f"full batch {index} has {rows} rows for"
                f" accumulation_steps={accumulation_steps}{ranks}"
            )
            raise UsageError(
                message,
                where=f"batches(), full batch {index}",
                expected=f"at least {accumulation_steps * shares} rows",
                because="every rank needs at least one row in every micro-batch",
                fix=f"--accumulation-steps {most}, or larger batches" if most else "larger batches",
            )
        cycles.append(
            [cut(share, accumulation_steps, split) for share in cut(rows, shares, "even")]
        )
    laid_out = [_spans(sizes) for sizes in cycles]
    return [ranks * world_size for ranks in laid_out] if every_rank_all else laid_out


def _tail(index: int, rows: int, normal: list[list[int]]) -> list[list[int]]:
    """Cut the rows of the tail at the slice sizes [rank][micro_step] of a normal cycle."""
    if rows < len(normal):
        raise UsageError(
            f"full batch {index}, the tail, has {rows} rows for world_size={len(normal)}",
            where=f"batches(), full batch {index}",
            expected=f"at least {len(normal)} rows, or no tail",
            because="every rank needs at least one row to take part in the optimizer step",
            fix="drop the last batch in batches(), or make it longer",
        )
    shares = cut(rows, len(normal), "even")
    needed = max(_slices_needed(share, sizes) for share, sizes in zip(shares, normal, strict=True))
    count = min(needed, *shares)
    return [_fill(share, sizes[:count]) for share, sizes in zip(shares, normal, strict=True)]


def _slices_needed(rows: int, sizes: list[int]) -> int:
    """Return how many of the slices it takes to hold the rows."""
    return 1 + sum(filled < rows for filled in itertools.accumulate(sizes))


def _fill(rows: int, sizes: list[int]) -> list[int]:
    """Consume the sizes in order, with a row left for each slice to come, the last taking all."""
    filled: list[int] = []
    for following in range(len(sizes) - 1, 0, -1):
        filled.append(min(sizes[len(filled)], rows - following))
        rows -= filled[-1]
    return [*filled, rows]


def _spans(sizes: list[list[int]]) -> list[list[tuple[int, int]]]:
    """Turn sizes [rank][micro_step] into (start, stop), one rank after the other."""
    start, ranks = 0, []
    for rank in sizes:
        spans = []
        for size in rank:
            spans.append((start, start + size))
            start += size
        ranks.append(spans)
    return ranks


def block_permutation(slices: Sequence[tuple[int, int]], which: int) -> list[int]:
    """Return an order of the rows that moves whole micro-batches.

    Args:
        slices: (start, stop) of each block; together all rows of the full batch.
        which: 0 reverses the blocks, n > 0 rotates them by n (never by a full turn).

    Returns:
        Row numbers in their new order; the identity only if there is one block.
    """
    blocks = list(slices)
    if which == 0:
        blocks.reverse()
    elif len(blocks) > 1:
        turn = 1 + (which - 1) % (len(blocks) - 1)
        blocks = blocks[turn:] + blocks[:turn]
    return [row for start, stop in blocks for row in range(start, stop)]


def rows_of(batch: object, where: str = "batches()") -> int:
    """Return how many samples a full batch holds.

    Args:
        batch: Any nesting of mappings, lists, tuples, dataclasses, tensors and arrays.
        where: Which batch it is, for the error.

    Returns:
        The size of dimension 0 that all tensors and arrays (0-dimensional ones aside) share.

    Raises:
        UsageError: Two sizes differ (both are named), or there is no tensor with a dimension 0.
    """
    sizes: dict[int, str] = {}

    def note(path: str, leaf: Any) -> Any:
        if _has_rows(leaf):
            sizes.setdefault(len(leaf), path)
        return leaf

    walk(note, "batch", batch)
    if not sizes:
        raise UsageError(
            "no-samples: a batch holds no tensor or array with a dimension 0",
            where=where,
            expected="tensors or numpy arrays whose dimension 0 is the sample",
            because=f"batches() yielded {type(batch).__name__}: there is nothing to slice",
            fix="tensor[None] makes one sample of a tensor without a dimension",
        )
    (rows, path), *others = sizes.items()
    if others:
        other_rows, other_path = others[0]
        raise UsageError(
            f"rows-differ: {path} has {rows} rows, {other_path} has {other_rows}",
            where=where,
            expected="the same dimension 0 in every tensor of a batch: the sample",
            because="a micro-batch is the same slice of every tensor",
            fix="move the sample to dimension 0, or what is no sample into the model or train",
        )
    return rows


def take(batch: Any, rows: slice | list[int]) -> Any:
    """Return the same nesting with only these samples.

    Args:
        batch: Any nesting of mappings, lists, tuples, dataclasses, tensors and arrays.
        rows: A slice (tensors and arrays become views of it) or row numbers (copies).

    Returns:
        The nesting with every tensor and array indexed on dimension 0; 0-dimensional ones,
        scalars, strings, None and unknown objects as they are. A mapping that cannot be rebuilt
        as its own type becomes a dict.
    """

    def pick(_path: str, leaf: Any) -> Any:
        if not _has_rows(leaf):
            return leaf
        if isinstance(leaf, torch.Tensor) and leaf.layout != torch.strided:
            return leaf.index_select(0, torch.arange(len(leaf), device=leaf.device)[rows])
        return leaf[rows]

    return walk(pick, "batch", batch)


def join(batches: Sequence[Any]) -> Any:
    """Return the batches concatenated along dimension 0: the inverse of take.

    Args:
        batches: At least one batch; all of the same nesting.

    Returns:
        The nesting with every tensor and array concatenated, and what has no rows as it is in
        the first batch.

    Raises:
        ValueError: The nestings differ.
    """

    def concatenate(path: str, *leaves: Any) -> Any:
        if len({(_has_rows(leaf), isinstance(leaf, torch.Tensor)) for leaf in leaves}) > 1:
            raise ValueError(f"{path} is of another kind in some batches")
        if not _has_rows(leaves[0]):
            return leaves[0]
        if isinstance(leaves[0], torch.Tensor):
            return torch.cat(leaves)
        return np.concatenate(leaves)

    return walk(concatenate, "batch", *batches)


def named_tensors(value: Any, path: str = "", depth: int = 8) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in any nesting of mappings, lists, tuples and dataclasses, with their paths.

    Args:
        value: The nesting; what is none of those, and no tensor, is passed over.
        path: Put before each path, whose keys and positions are joined by dots.
        depth: Levels to go down: what a module is called with may contain itself.
    """
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping) or (hasattr(value, "keys") and hasattr(value, "items")):
        inner = value.items()
    elif isinstance(value, list | tuple):
        inner = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inner = vars(value).items() if hasattr(value, "__dict__") else ()
    for key, each in inner if depth else ():
        yield from named_tensors(each, f"{path}.{key}" if path else str(key), depth - 1)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in any nesting; see named_tensors."""
    return (tensor for _, tensor in named_tensors(value))


def _has_rows(leaf: Any) -> bool:
    """Tell whether dimension 0 of this leaf is the sample."""
    return isinstance(leaf, torch.Tensor | np.ndarray) and leaf.ndim > 0


def walk(function: Callable[..., Any], path: str, node: Any, *others: Any) -> Any:
    """Rebuild a nesting with function(path, leaf, *leaves of the others) in place of each leaf.

    Args:
        function: What it returns stands in the place of the leaf.
        path: Name of the node, for messages.
        node: Any nesting of mappings, lists, tuples and dataclasses; all else is a leaf.
        others: Nestings of the same form.

    Raises:
        ValueError: The nestings differ.
    """

    def below(step: str, *children: Any) -> Any:
        return walk(function, path + step, *children)

    if isinstance(node, Mapping):
        _same_keys(path, node, others)
        return _rebuilt(
            node, {key: below(f"[{key!r}]", *(m[key] for m in (node, *others))) for key in node}
        )
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        names = (f".{name}" for name in node._fields)
        return type(node)(*map(below, names, *_same_length(path, node, others)))
    if isinstance(node, list | tuple):
        steps = (f"[{index}]" for index in range(len(node)))
        items = list(map(below, steps, *_same_length(path, node, others)))
        return items if isinstance(node, list) else tuple(items)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        result = copy.copy(node)
        for field in dataclasses.fields(node):
            if not hasattr(node, field.name):
                continue
            children = (getattr(item, field.name) for item in (node, *others))
            # Frozen dataclasses refuse setattr, also on a copy that nobody has seen yet.
            object.__setattr__(result, field.name, below(f".{field.name}", *children))
        return result
    return function(path, node, *others)


def _same_keys(path: str, node: Mapping[Any, Any], others: Sequence[Any]) -> None:
    """Raise ValueError unless all mappings have the same keys."""
    for other in others:
        if not isinstance(other, Mapping) or other.keys() != node.keys():
            raise ValueError(f"{path} has other keys in some batches")


def _same_length(path: str, node: Sequence[Any], others: Sequence[Any]) -> Sequence[Sequence[Any]]:
    """Return all sequences; raise ValueError unless they have the same length."""
    for other in others:
        if type(other) is not type(node) or len(other) != len(node):
            raise ValueError(f"{path} has another length in some batches")
    return (node, *others)


def _rebuilt(node: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the node's type with these items, or a dict if that cannot be made."""
    try:
        if isinstance(node, dict):
            # Keeps what a constructor would lose: the factory of a defaultdict, attributes.
            result: Any = copy.copy(node)
            for key, value in items.items():
                result[key] = value
        else:
            # No copy: the copy of an unknown mapping may share its storage with the original.
            kind: Any = type(node)
            result = kind(items)
        kept = result.keys() == items.keys() and all(result[key] is items[key] for key in items)
    except Exception:  # noqa: BLE001 - whatever a foreign constructor raises
        kept = False
    return result if kept else items
