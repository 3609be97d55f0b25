"""Rows as text: what is read is what is written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.rows import parse, written

rows = st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True)


@given(st.lists(st.tuples(st.integers(0, 9), rows), min_size=1, max_size=4))
def test_reading_undoes_writing(chosen):
    assert parse(written(chosen)) == chosen


def test_runs_are_written_short():
    assert written([(0, [0, 1, 2, 5]), (3, [4])]) == "0:0-2+5,3:4"
    assert parse("0:0-2+5, 3:4") == [(0, [0, 1, 2, 5]), (3, [4])]


@pytest.mark.parametrize(
    "text", ["", "0", "0:", "0:3-1", "0:1+1", "0:0-2+2", "a:1", "0:1;1:1", "0:-1"]
)
def test_what_names_no_rows_is_refused(text):
    with pytest.raises(UsageError):
        parse(text)


def test_rows_tell_cases_apart_and_leave_other_ids_alone():
    plain = Case("train_step.py", 4)

    assert Case("train_step.py", 4, rows="0:0-1").id != plain.id
    assert Case("train_step.py", 4, rows="0:0-1").label == "K=4 rows=0:0-1"
