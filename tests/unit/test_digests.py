"""Samples are recognised whatever batch they come in, and not taken for others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equivcheck.attach.digests import LISTED, Rule, row_digests


def digests(tensor, rule=None, **others):
    named = [("args.0", tensor), *((f"kwargs.{name}", each) for name, each in others.items())]
    return [whole for whole, _ in row_digests(named, Rule() if rule is None else rule)]


@pytest.mark.parametrize(
    "rows",
    [
        torch.randn(12, 5, generator=torch.Generator().manual_seed(0)),
        torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.randint(0, 9, (12, 6), generator=torch.Generator().manual_seed(0)),
        torch.randint(0, 2, (12, 6), generator=torch.Generator().manual_seed(0)).bool(),
        torch.arange(12),
        torch.zeros(12, 4),
    ],
    ids=["floats", "images", "tokens", "flags", "one-number", "zeros"],
)
@given(size=st.integers(1, 12))
def test_a_row_is_the_same_in_every_batch(rows, size):
    """Cut into batches of any size, the rows have the numbers that they have together."""
    rule = Rule()
    whole = digests(rows, rule)

    assert [each for part in rows.split(size) for each in digests(part, rule)] == whole


def test_different_rows_have_different_numbers():
    rows = torch.randint(0, 50, (500, 8), generator=torch.Generator().manual_seed(1)).unique(dim=0)

    assert len(set(digests(rows))) == len(rows)
    assert len(set(digests(rows.double() / 7))) == len(rows)


def test_swapped_entries_are_another_row():
    assert digests(torch.tensor([[1, 2]])) != digests(torch.tensor([[2, 1]]))
    assert digests(torch.tensor([[1.0, 2.0]])) != digests(torch.tensor([[2.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_was_promoted_is_the_same_row(dtype):
    """Numbers that the working precision holds are the same in float64."""
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)

    assert digests(rows.to(dtype)) == digests(rows)


def test_whole_numbers_of_any_width_are_the_same_row():
    rows = torch.tensor([[3, 1, 4], [1, 5, 9]])

    assert digests(rows.int()) == digests(rows)


def test_rounding_within_a_kernel_is_the_same_row():
    """Features from a frozen encoder differ by roundings when other rows stand beside them."""
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    assert digests(rows * (1 + 1e-14)) == digests(rows)


def test_a_difference_of_a_thousandth_is_another_row():
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moved = rows.clone()
    moved[:, 0] += 1e-2 * rows.norm(dim=1)

    assert all(a != b for a, b in zip(digests(rows), digests(moved), strict=True))


@pytest.mark.parametrize("padding", [0, -100, 7])
def test_trailing_padding_counts_for_nothing(padding):
    """A sentence alone is the sentence that longer ones stand beside, once the padding is known."""
    long = torch.tensor([[4, 5, 6, 4, 5], [8, 9, padding, padding, padding], [3, 1, 4, 1, 6]])
    long = torch.cat([long, torch.tensor([[2, padding, padding, padding, padding]])])
    rule = Rule()
    whole = digests(long, rule)

    assert digests(torch.tensor([[8, 9]]), rule) == whole[1:2]
    assert digests(torch.tensor([[8, 9, padding], [4, 5, 6]]), rule)[0] == whole[1]


def test_what_the_attention_mask_leaves_out_counts_for_nothing():
    ids, mask = torch.tensor([[5, 6, 2, 2], [7, 8, 9, 1]]), torch.tensor([[1, 1, 0, 0], [1] * 4])
    rule = Rule()
    whole = digests(ids, rule, attention_mask=mask)

    assert digests(ids[:1, :2], rule, attention_mask=mask[:1, :2]) == whole[:1]


def test_a_row_that_lost_its_last_token_is_recognised_by_its_second_number():
    """`ids[:, :-1]` cuts the longest row of a batch; beside longer ones it keeps all its tokens."""
    whole = row_digests([("args.0", torch.tensor([[5, 6, 7, 0], [1, 2, 3, 4]]))], Rule())
    alone = row_digests([("args.0", torch.tensor([[5, 6]]))], Rule())

    assert whole[0][1] == alone[0][0]
    assert whole[0][0] != alone[0][0]


def test_what_has_no_rows_is_left_out():
    """A mask over positions has another first dimension than the batch; with one row it is not taken for it."""
    rule = Rule()
    positions = torch.arange(6)[None]
    whole = digests(torch.arange(8).view(4, 2), rule, positions=positions)

    assert digests(torch.arange(2).view(1, 2), rule, positions=positions) == whole[:1]
    assert rule.paths == ["args.0"]


def test_a_call_without_tensors_has_no_rows():
    assert row_digests([], Rule()) == []
    assert row_digests([("args.0", torch.tensor(3.0))], Rule()) == []


def test_samples_may_stand_in_dimension_one():
    """Models that take time first: [T, B, C]."""
    rows = torch.randn(5, 8, 3)
    whole = digests(rows, Rule(axis=1))

    assert whole == digests(rows.transpose(0, 1))
    assert [each for part in rows.split(2, dim=1) for each in digests(part, Rule(axis=1))] == whole


def test_samples_may_be_the_elements_of_a_list():
    """Detection models take a list of images, each of its own size, and a list of their targets."""
    images = [torch.randn(3, 4 + n, 5) for n in range(6)]
    labels = [{"label": torch.tensor(n), "boxes": torch.randn(n, 4)} for n in range(6)]

    def called(chosen, rule):
        named = [(f"args.0.{i}", images[n]) for i, n in enumerate(chosen)]
        for i, n in enumerate(chosen):
            named += [(f"args.1.{i}.{key}", each) for key, each in labels[n].items()]
        return row_digests(named, rule)

    rule = Rule(axis=LISTED)
    whole = called(range(6), rule)

    assert len(set(whole)) == 6
    assert called([4], rule) + called([2, 5], rule) == [whole[n] for n in (4, 2, 5)]


@pytest.mark.parametrize(
    "numbers",
    [torch.tensor([0, 0, 1, 2, 2, 3]), torch.tensor([3, 0, 5, 1, 2, 4])],
    ids=["graph-of-a-node", "order-of-a-packed-sequence"],
)
def test_what_numbers_the_rows_of_a_batch_is_left_out(numbers):
    rows, rule = torch.randn(6, 4), Rule()
    whole = digests(rows, rule, numbers=numbers)

    assert digests(rows[3:], rule, numbers=torch.tensor([0, 1, 1])) == whole[3:]
    assert rule.paths == ["args.0"]


def test_what_numbers_the_rows_counts_where_nothing_else_tells_them_apart():
    numbers = torch.arange(6)

    assert len(set(digests(numbers))) == 6
    assert len(set(digests(torch.ones(6, 2), numbers=numbers))) == 6


@pytest.mark.parametrize("value", [0.0, -torch.inf, torch.finfo(torch.float32).min], ids=str)
def test_padding_along_any_dimension_counts_for_nothing(value):
    """Spectrograms are padded in their last dimension, additive masks with what no data holds."""
    rows = torch.randn(4, 3, 5)
    padded = torch.full((4, 3, 8), value)
    padded[..., :5] = rows

    assert digests(padded) == digests(rows)
    assert digests(padded.double()) == digests(rows)


def test_segments_that_end_rows_are_not_taken_for_padding_midway():
    """All rows of one batch end alike, some of the next: what was counted in the first is counted ever after."""
    alike = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]])
    mixed = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 1], [0, 1, 2, 2], [1, 1, 2, 2]])
    full = Rule()
    known = [row_digests([("args.0", each)], full) for each in (alike, mixed)]
    micro = Rule(**full.as_dict())
    again = [row_digests([("args.0", each)], micro) for each in (alike, mixed[:2], mixed[2:])]

    assert known[0] == again[0]
    assert known[1] == again[1] + again[2]
