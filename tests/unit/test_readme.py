"""The README's generated parts are up to date."""

from __future__ import annotations

from pathlib import Path

from equivcheck.causes.__main__ import BEGIN, END, updated

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_causes_is_the_catalogue():
    """`make readme` has been run."""
    page = README.read_text(encoding="utf-8")

    assert page.count(BEGIN) == page.count(END) == 1
    assert page == updated(page)
