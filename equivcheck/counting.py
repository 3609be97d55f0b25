"""What a batch holds that a loss may be a mean over: entries, labels, what a mask leaves in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["ADDED_UP", "is_weight", "masks"]

# Behind the name of whole numbers of rows: lengths may be added up, and so are classes, which count nothing.
ADDED_UP = " added up"

# Dimensions of a weight per row, or per entry of a row.
_WEIGHT_DIMENSIONS = (1, 2)


def is_weight(tensor: torch.Tensor) -> bool:
    """Return whether a tensor may hold what a mean is taken with: weights of rows or their entries, lengths of rows."""
    is_length = tensor.dim() == 1 and not tensor.is_complex() and tensor.dtype != torch.bool
    return (
        (is_length or tensor.is_floating_point())
        and tensor.dim() in _WEIGHT_DIMENSIONS
        and bool((tensor >= 0).all())
        and bool(tensor.any())
    )


def masks(path: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield, with a label each, masks of what a tensor holds that may be counted.

    Args:
        path: What the tensor is called.
        tensor: Dimension 0 is the sample.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        if bool(((tensor == 0) | (tensor == 1)).all()):
            yield f"{path} != 0", tensor != 0
        return
    yield f"{path} entries", torch.ones_like(tensor, dtype=torch.bool)
    if not tensor.numel():
        return
    if tensor.dtype == torch.bool or int(tensor.min()) >= 0:
        yield f"{path} != 0", tensor != 0
    if tensor.dtype != torch.bool and bool((tensor < 0).any()):
        yield f"{path} >= 0", tensor >= 0
        if tensor.dim() > 1 and tensor.shape[1] > 1:
            yield f"{path}[:, 1:] >= 0", tensor[:, 1:] >= 0
