"""Cutting full batches into micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from equivcheck.errors import UsageError
from equivcheck.split import block_permutation, cut, join, plan, rows_of, take

SPLITS = st.sampled_from(["even", "uneven"])
STEPS = st.integers(1, 9)


@pytest.mark.parametrize(
    ("rows", "parts", "split", "expected"),
    [
        (16, 4, "even", [4, 4, 4, 4]),
        (10, 4, "even", [3, 3, 2, 2]),
        (10, 4, "uneven", [1, 2, 3, 4]),
        (20, 4, "uneven", [2, 4, 6, 8]),
        (16, 4, "uneven", [2, 3, 5, 6]),
        (4, 4, "uneven", [1, 1, 1, 1]),
        (5, 4, "uneven", [1, 1, 1, 2]),
        (1, 1, "uneven", [1]),
    ],
)
def test_cut_by_hand(rows, parts, split, expected):
    assert cut(rows, parts, split) == expected


@given(st.integers(1, 200), STEPS, SPLITS)
def test_a_cut_is_a_partition_without_empty_slices(rows, parts, split):
    assume(rows >= parts)
    sizes = cut(rows, parts, split)

    assert sum(sizes) == rows
    assert len(sizes) == parts
    assert min(sizes) >= 1


@given(st.integers(1, 300), STEPS)
def test_an_even_cut_is_as_even_as_can_be(rows, parts):
    assume(rows >= parts)
    sizes = cut(rows, parts, "even")

    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(st.integers(1, 300), STEPS)
def test_an_uneven_cut_is_within_a_row_of_the_proportion(rows, parts):
    whole = parts * (parts + 1) // 2
    assume(rows >= whole)
    sizes = cut(rows, parts, "uneven")

    assert all(abs(size * whole - rows * k) < whole for k, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("rows", "parts", "split", "match"),
    [
        (3, 4, "even", "3 rows cannot be cut into 4"),
        (3, 0, "even", "into 0"),
        (3, 2, "odd", "unknown split 'odd'"),
    ],
)
def test_impossible_cuts_are_usage_errors(rows, parts, split, match):
    with pytest.raises(UsageError, match=match):
        cut(rows, parts, split)


def sizes_of(cycle):
    return [[stop - start for start, stop in rank] for rank in cycle]


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=5),
    STEPS,
    SPLITS,
    st.integers(1, 4),
)
def test_a_plan_consumes_every_row_once_and_in_order(batch_rows, steps, split, world_size):
    try:
        cycles = plan(batch_rows, steps, split, world_size)
    except UsageError:
        assume(False)

    for rows, cycle in zip(batch_rows, cycles, strict=True):
        spans = [span for rank in cycle for span in rank]
        assert len(cycle) == world_size
        assert len({len(rank) for rank in cycle}) == 1
        assert all(start < stop for start, stop in spans)
        assert [row for span in spans for row in range(*span)] == list(range(rows))
        shares = [sum(sizes) for sizes in sizes_of(cycle)]
        assert max(shares) - min(shares) <= 1
    tail = len(batch_rows) > 1 and batch_rows[-1] < min(batch_rows[:-1])
    whole = cycles[:-1] if tail else cycles
    assert all(len(rank) == steps for cycle in whole for rank in cycle)
    assert len(cycles[-1][0]) <= steps


@pytest.mark.parametrize(
    ("batch_rows", "steps", "split", "world_size", "last"),
    [
        ([16, 16, 5], 4, "even", 1, [[4, 1]]),
        ([16, 16, 4], 4, "even", 1, [[4]]),
        ([16, 16, 13], 4, "even", 1, [[4, 4, 4, 1]]),
        ([20, 7], 4, "uneven", 1, [[2, 4, 1]]),
        ([16, 1], 4, "even", 1, [[1]]),
        ([16, 16], 4, "even", 1, [[4, 4, 4, 4]]),
        ([8, 16, 8], 4, "even", 1, [[2, 2, 2, 2]]),
        ([7], 4, "even", 1, [[2, 2, 2, 1]]),
        ([16, 9], 4, "even", 2, [[2, 2, 1], [2, 1, 1]]),
        ([16, 5], 4, "even", 2, [[2, 1], [1, 1]]),
        ([8, 3], 4, "even", 2, [[2], [1]]),
        ([17, 15], 4, "even", 2, [[3, 2, 2, 1], [2, 2, 2, 1]]),
    ],
)
def test_only_a_shorter_last_batch_is_cut_at_the_size_of_the_others(
    batch_rows, steps, split, world_size, last
):
    assert sizes_of(plan(batch_rows, steps, split, world_size)[-1]) == last


@given(st.lists(st.integers(30, 60), min_size=1, max_size=4), STEPS, SPLITS, st.integers(1, 4))
def test_every_rank_sees_all_samples_where_asked(batch_rows, steps, split, world_size):
    alone = plan(batch_rows, steps, split)

    assert plan(batch_rows, steps, split, world_size, every_rank_all=True) == [
        cycle * world_size for cycle in alone
    ]


@pytest.mark.parametrize(
    ("batch_rows", "world_size", "match", "fix"),
    [
        (
            [8, 3, 8],
            1,
            "full batch 1 has 3 rows for accumulation_steps=4",
            "--accumulation-steps 3",
        ),
        (
            [7],
            2,
            r"full batch 0 has 7 rows for accumulation_steps=4 \* world_size=2",
            "--accumulation-steps 3",
        ),
        ([1], 2, "full batch 0 has 1 rows", "larger batches"),
        ([16, 2], 4, "full batch 1, the tail, has 2 rows for world_size=4", "drop"),
        ([16], 0, "world_size is 0", ""),
        ([16, 0], 1, "the tail, has 0 rows", "drop"),
    ],
)
def test_too_few_rows_are_usage_errors(batch_rows, world_size, match, fix):
    with pytest.raises(UsageError, match=match) as raised:
        plan(batch_rows, 4, "even", world_size)

    assert (raised.value.fix or "").startswith(fix)


@given(st.integers(1, 60), STEPS, SPLITS, st.integers(0, 12))
def test_a_block_permutation_moves_whole_blocks(rows, parts, split, which):
    assume(rows >= parts)
    (rank,) = plan([rows], parts, split)[0]
    order = block_permutation(rank, which)

    assert sorted(order) == list(range(rows))
    assert (order == list(range(rows))) == (parts == 1)
    for start, stop in rank:
        first = order.index(start)
        assert order[first : first + stop - start] == list(range(start, stop))


def test_permutations_by_hand():
    blocks = [(0, 2), (2, 3), (3, 5)]

    assert block_permutation(blocks, 0) == [3, 4, 2, 0, 1]
    assert block_permutation(blocks, 1) == [2, 3, 4, 0, 1]
    assert block_permutation(blocks, 2) == [3, 4, 0, 1, 2]
    assert block_permutation(blocks, 3) == block_permutation(blocks, 1)


Pair = namedtuple("Pair", ["first", "second"])  # noqa: PYI024 - as users write them


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A batch as a dataclass that refuses to be changed."""

    x: Any
    note: str = "note"
    length: int = dataclasses.field(init=False, default=3)


class ReadOnly(Mapping):
    """A mapping that its own constructor cannot rebuild."""

    def __init__(self, one, two):
        self.held = {"one": one, "two": two}

    def __getitem__(self, key):
        return self.held[key]

    def __iter__(self):
        return iter(self.held)

    def __len__(self):
        return len(self.held)


class Copying(UserDict):
    """A mapping that keeps copies of what it is given."""

    def __setitem__(self, key, value):
        self.data[key] = value.clone()


def leaf(seed=0):
    return torch.arange(12).reshape(6, 2) + seed


NESTINGS = [
    leaf(),
    leaf().numpy(),
    {"x": leaf(), "y": leaf(1)[:, 0], "n": 3, "s": "text", "none": None},
    OrderedDict(b=leaf(), a=leaf(1)),
    UserDict(x=leaf()),
    (leaf(), [leaf(1).numpy(), torch.tensor(2.0), np.array(3), np.float32(4)]),
    Pair(leaf(), {"deep": (leaf(),)}),
    Frozen(leaf()),
    [],
]


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor | np.ndarray):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert bool((left == right).all())
    elif isinstance(left, Mapping):
        assert list(left) == list(right)
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            same(one, other)
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            same(getattr(left, field.name), getattr(right, field.name))
    else:
        assert left == right


@pytest.mark.parametrize("batch", NESTINGS, ids=lambda batch: type(batch).__name__)
@given(at=st.lists(st.integers(0, 6), max_size=4))
def test_join_is_the_inverse_of_take(batch, at):
    edges = [0, *sorted(at), 6]

    same(join([take(batch, slice(*span)) for span in itertools.pairwise(edges)]), batch)
    same(take(take(batch, [5, 4, 3, 2, 1, 0]), [5, 4, 3, 2, 1, 0]), batch)


def test_a_slice_is_a_view():
    tensor, array = leaf(), leaf().numpy()

    assert take(tensor, slice(2, 4)).data_ptr() == tensor[2:].data_ptr()
    assert np.shares_memory(take(array, slice(2, 4)), array)


def test_sparse_tensors_are_taken_and_joined():
    sparse = torch.eye(6).to_sparse_coo()

    assert torch.equal(take(sparse, slice(2, 4)).to_dense(), torch.eye(6)[2:4])
    parts = [take(sparse, [5, 0]), take(sparse, slice(0, 1))]
    assert torch.equal(join(parts).to_dense(), torch.eye(6)[[5, 0, 0]])


def test_mappings_keep_what_no_constructor_would():
    batch = defaultdict(list, x=leaf())
    taken = take(batch, slice(0, 2))

    assert taken.default_factory is list
    assert len(taken["x"]) == 2
    assert len(batch["x"]) == 6


@pytest.mark.parametrize(
    "batch",
    [ReadOnly(leaf(), leaf()), Copying(x=leaf()), types.MappingProxyType({"x": leaf()})],
    ids=lambda batch: type(batch).__name__,
)
def test_a_mapping_that_cannot_be_rebuilt_is_not_changed(batch):
    before = {key: batch[key] for key in batch}
    taken = take(batch, slice(0, 2))

    assert list(taken) == list(batch)
    assert all(batch[key] is before[key] for key in batch)
    assert isinstance(taken, dict | types.MappingProxyType)
    assert all(len(value) == 2 for value in taken.values())


@pytest.mark.parametrize(
    "batch",
    [batch for batch in NESTINGS if batch is not NESTINGS[-1]],
    ids=lambda b: type(b).__name__,
)
def test_rows_are_counted_in_any_nesting(batch):
    assert rows_of(batch) == 6


def test_rows_that_differ_are_named_with_their_paths():
    batch = {"x": leaf(), "deep": [Pair(torch.tensor(1), leaf()[:4])]}

    with pytest.raises(
        UsageError, match=r"batch\['x'\] has 6 rows, batch\['deep'\]\[0\]\.second has 4"
    ):
        rows_of(batch)


@pytest.mark.parametrize("batch", [[], {"n": 3}, torch.tensor(1.0), Frozen])
def test_a_batch_without_rows_is_a_usage_error(batch):
    with pytest.raises(UsageError, match="no-samples"):
        rows_of(batch)


@pytest.mark.parametrize(
    ("left", "right", "match"),
    [
        ({"x": leaf()}, {"y": leaf()}, "batch has other keys"),
        ({"x": leaf()}, [leaf()], "batch has other keys"),
        ({"x": [leaf()]}, {"x": []}, r"batch\['x'\] has another length"),
        ([leaf()], (leaf(),), "another length"),
        (leaf(), 3, "another kind"),
        (leaf(), leaf().numpy(), "batch is of another kind"),
    ],
)
def test_batches_of_other_nestings_do_not_join(left, right, match):
    with pytest.raises(ValueError, match=match):
        join([left, right])


def test_a_field_that_was_never_set_stays_so():
    """A dataclass may fill one in later."""

    @dataclasses.dataclass
    class Batch:
        x: torch.Tensor
        cache: torch.Tensor = dataclasses.field(init=False)

    found = take(Batch(torch.arange(4)), slice(1, 3))

    assert found.x.tolist() == [1, 2]
    assert not hasattr(found, "cache")
