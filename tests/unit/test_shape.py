"""The first place of a result that is not what it should be, in the words of JSON."""

from __future__ import annotations

import pytest

from equivcheck.shape import kind, misfit

CASE = {"id": "0123456789", "verdict": "equivalent"}


def told(**fields):
    """Return what is said of a result with one field more, or another one."""
    return misfit({"schema": "equivcheck.result/1", "cases": [CASE], **fields})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"target": None}, None),
        ({"cases": [{**CASE, "more": [1]}]}, None),
        ({"cases": {}}, "cases is a table, not a list"),
        ({"cases": [None]}, "cases[0] is null, not a table"),
        ({"cases": [CASE, "divergent"]}, "cases[1] is a string, not a table"),
        ({"cases": [{**CASE, "causes": [[]]}]}, "cases[0].causes[0] is a list, not a table"),
        ({"verdict": 3}, "verdict is a number, not a string"),
        ({"verdict": ["divergent"]}, "verdict is a list, not a string"),
        ({"interrupted": "no"}, "interrupted is a string, not true or false"),
        ({"planned": True}, "planned is true, not a whole number"),
        ({"planned": 10**400}, "planned is a number out of range, not a whole number"),
        ({"schema": None}, "schema is null, not a string"),
    ],
)
def test_the_first_misfit_is_named_with_its_place(fields, expected):
    assert told(**fields) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "null"),
        (False, "false"),
        (True, "true"),
        (2.5, "a number"),
        (float("inf"), "a number out of range"),
        ("a", "a string"),
        ([], "a list"),
        ({}, "a table"),
    ],
)
def test_every_kind_of_value_has_a_word(value, expected):
    assert kind(value) == expected
