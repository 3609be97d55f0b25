"""What may be counted in a tensor, and what may be a weight."""

from __future__ import annotations

import pytest
import torch

from equivcheck.counting import is_weight, masks


def counted(tensor):
    """Return how many entries each mask leaves in, by its label without the tensor's name."""
    return {label.removeprefix("y"): int(mask.sum()) for label, mask in masks("y", tensor)}


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([[0, 3, -100]]), {" entries": 3, " >= 0": 2, "[:, 1:] >= 0": 1}),
        (torch.tensor([2, -100, 0]), {" entries": 3, " >= 0": 2}),
        (torch.tensor([[-100], [1]]), {" entries": 2, " >= 0": 1}),
        (torch.tensor([2, 0, 0]), {" entries": 3, " != 0": 1}),
        (torch.tensor([True, False]), {" entries": 2, " != 0": 1}),
        (torch.zeros(0, dtype=torch.long), {" entries": 0}),
        (torch.tensor([1.0, 0.0, 1.0]), {" != 0": 2}),
        (torch.tensor([1.0, 0.5]), {}),
        (torch.tensor([1j]), {}),
    ],
    ids=[
        "labels",
        "of rows",
        "one column",
        "ids",
        "mask",
        "none",
        "floating mask",
        "data",
        "complex",
    ],
)
def test_what_a_tensor_holds_is_counted_by_its_kind(tensor, expected):
    """Labels below zero count for nothing, and the first of each row is no target of a shifted loss."""
    assert counted(tensor) == expected


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor([0.5, 2.0]), True),
        (torch.tensor([[0.0, 1.0]]), True),
        (torch.tensor([0.0, 0.0]), False),
        (torch.tensor([-0.5, 2.0]), False),
        (torch.tensor([1, 2]), True),
        (torch.tensor([[1, 2]]), False),
        (torch.tensor([True, False]), False),
        (torch.tensor(1.0), False),
        (torch.ones(1, 1, 1), False),
    ],
)
def test_a_weight_is_of_rows_or_entries_a_length_of_rows_and_neither_negative(tensor, expected):
    assert is_weight(tensor) is expected
