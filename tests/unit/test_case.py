"""Cases: identity, labels, and refusal of what makes no sense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivcheck.case import SPLITS, STRATEGIES, Case
from equivcheck.errors import UsageError

cases = st.builds(
    Case,
    target=st.text(min_size=1),
    accumulation_steps=st.integers(1, 64),
    split=st.sampled_from(SPLITS),
    world_size=st.integers(1, 8),
    strategy=st.sampled_from(STRATEGIES),
    precision=st.text(min_size=1),
    seed=st.integers(0),
    optimizer_steps=st.integers(1, 64),
    workload=st.none() | st.text(min_size=1),
)


def test_ids_never_change():
    """Ids in saved results and bug reports stay valid in later versions."""

    assert Case("train_step.py", 4).id == "ab89138d00"
    assert Case("train_step.py", 4, split="uneven", seed=3).id == "d368d2a50e"


@given(cases)
def test_a_case_survives_json(case):
    """A case read back from a result is the same case."""
    again = Case.from_dict(json.loads(json.dumps(case.as_dict())))

    assert (again, again.id, len(again.id)) == (case, case.id, 10)


@given(cases, cases)
def test_only_equal_cases_share_an_id(one, other):
    """Every field is a part of the identity."""

    assert (one.id == other.id) == (one == other)


def test_the_label_names_what_is_not_default():
    """Neighbours in a table can be told apart."""

    assert Case("t.py", 4).label == "K=4"
    assert Case("t.py", 2, split="uneven", workload="gpt").label == "gpt K=2 split=uneven"


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulation_steps": 0},
        {"accumulation_steps": True},
        {"accumulation_steps": 2.0},
        {"split": "odd"},
        {"strategy": "dpp"},
        {"device": "tpu"},
        {"world_size": 0},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong):
    """A case that exists can be run."""
    with pytest.raises(UsageError):
        Case(**{"target": "t.py", "accumulation_steps": 2} | wrong)


def test_a_case_without_its_fields_is_refused():
    """A foreign mapping is a usage error, not a KeyError."""
    with pytest.raises(UsageError, match="accumulation_steps"):
        Case.from_dict({"target": "t.py"})
