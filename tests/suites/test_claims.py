"""The page of claims is in line with the suites that it is made from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from equivcheck.suite import bundled, expanded, read_suite

PAGE = Path(__file__).parents[2] / "reports" / "claims.md"
CLAIMS = [*range(1, 20), 21, 22, 23, 26, 27, 30]


@pytest.mark.parametrize("number", CLAIMS, ids=lambda number: f"C{number}")
def test_every_claim_has_a_row_with_numbers(number):
    """Each is named on the page."""

    assert re.search(rf"\| (C\d+, )*C{number}[ ,]", PAGE.read_text(encoding="utf-8"))


def test_the_page_says_what_the_suites_expect():
    """Each row's verdict and causes are those of a theory of its workload."""
    rows = {
        (path.removeprefix("suite:"), row.name): row
        for path in (*expanded("suite:all"), *expanded("suite:ranks"))
        for row in read_suite(path).workloads.values()
    }
    told = re.findall(
        r"^\| (C[^|]*) \| suite:(\w+) (\S+) [^|]*\| ([\w-]+) \| ([^|]*) \|",
        PAGE.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    stated = {name for name, row in rows.items() if row.claims}
    # Rows that were found otherwise stand in a list of their own.
    page = PAGE.read_text(encoding="utf-8")
    stated -= set(re.findall(r"^- C[^:]*: suite:(\w+) (\S+) .* was found ", page, re.MULTILINE))

    assert {(suite, name) for _, suite, name, _, _ in told} == stated
    for claims, suite, name, found, codes in told:
        row = rows[suite, name]
        assert ", ".join(row.claims) == claims
        pairs = [(each.verdict, " ".join(each.causes) or "-") for each in row.theories]
        assert (found, codes.strip()) in pairs


def test_the_suites_are_found():
    """In a clone they lie beside the package."""

    assert (bundled("suites") / "amp.py").is_file()
