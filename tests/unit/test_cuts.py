from __future__ import annotations

import pytest

from equivcheck.case import Case
from equivcheck.cuts import Cuts
from equivcheck.errors import UsageError
from equivcheck.feed import Data

DATA = Data([None, None], [8, 4])


def cuts(**fields):
    return Cuts(Case("loop", 2, **fields), DATA.rows)


def test_one_process_cuts_each_full_batch_in_k():
    """The shorter last batch is cut at the size of the ones before: it has one micro-batch of 4."""
    assert cuts().slices(DATA) == [[(0, 4), (4, 8)], [(0, 4)]]
    assert cuts().micro_batches(DATA) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert cuts().largest == 4


def test_ranks_share_a_batch_and_meet_in_micro_steps():
    shared = cuts(world_size=2)
    assert shared.slices(DATA)[0] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert shared.of_rank(DATA, 1) == [[4, 5], [6, 7], [10, 11]]
    assert shared.micro_steps(DATA) == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 10, 11]]


def test_ranks_that_share_no_batch_consume_all_of_it():
    whole = cuts(world_size=2, strategy="pipeline")
    assert whole.slices(DATA) == cuts().slices(DATA)
    assert whole.of_rank(DATA, 0) == whole.of_rank(DATA, 1) == cuts().micro_batches(DATA)


def test_turning_moves_the_first_micro_batches_of_every_cycle_to_its_end():
    assert cuts().turned(DATA, 1) == [[4, 5, 6, 7], [0, 1, 2, 3], [8, 9, 10, 11]]
    assert cuts().turned(DATA, 2) == cuts().micro_batches(DATA)


def test_another_k_and_fewer_batches_are_cut_alike():
    assert cuts().slices(DATA, 4) == [[(0, 2), (2, 4), (4, 6), (6, 8)], [(0, 2), (2, 4)]]
    assert cuts().slices(DATA.shorter()) == [[(0, 4), (4, 8)]]


def test_a_batch_of_too_few_rows_is_refused():
    with pytest.raises(UsageError, match="8"):
        Cuts(Case("loop", 16), DATA.rows)
