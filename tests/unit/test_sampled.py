"""Many vectors kept as one tensor are read as what they were."""

from __future__ import annotations

import pytest
import torch

from equivcheck.sampled import Sampled, Tray, packed


def test_vectors_are_read_back_in_float64_and_in_order():
    """What has no tensor stays None, and takes no place."""
    low = torch.tensor([0.5, 2.0], dtype=torch.bfloat16)
    kept = packed({"a": low, "none": None, "b": torch.tensor([3.0])}, Tray())

    assert list(kept) == ["a", "none", "b"]
    assert len(kept) == 3
    assert kept["none"] is None
    torch.testing.assert_close(kept["a"], low.double(), rtol=0.0, atol=0.0)
    torch.testing.assert_close(kept["b"], torch.tensor([3.0], dtype=torch.float64))
    assert kept.numbers.dtype == torch.float32
    with pytest.raises(KeyError):
        kept["c"]


@pytest.mark.parametrize("vectors", [{}, {"a": None}, {"a": torch.zeros(0)}])
def test_of_no_numbers_nothing_is_kept(vectors):
    kept = packed(vectors, Tray())

    assert kept.numbers.numel() == 0
    assert list(kept) == list(vectors)


def test_what_lies_on_a_tray_does_not_overlap():
    """Neither within a block nor where a tensor is larger than what is left of one, or than any block."""
    tray = Tray()
    sizes = (3, 5, 10 * 2**18, 10 * 2**18, 40 * 2**18, 7)
    found = [tray.empty(size, torch.float32).fill_(i) for i, size in enumerate(sizes)]

    assert [len(each) for each in found] == list(sizes)
    assert [float(each.min()) for each in found] == [float(i) for i in range(len(sizes))]
    assert [float(each.max()) for each in found] == [float(i) for i in range(len(sizes))]


def test_a_layout_says_what_each_name_has():
    kept = Sampled([("a", 1), ("b", None), ("c", 2)], torch.arange(3.0))

    assert {name: None if each is None else each.tolist() for name, each in kept.items()} == {
        "a": [0.0],
        "b": None,
        "c": [1.0, 2.0],
    }
