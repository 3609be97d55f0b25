"""The README's generated parts are up to date."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from equivcheck.causes.__main__ import BEGIN, END, updated

README = Path(__file__).parents[2] / "README.md"


def test_the_table_of_causes_is_the_catalogue():
    """`make readme` has been run."""
    page = README.read_text(encoding="utf-8")

    assert page.count(BEGIN) == page.count(END) == 1
    assert page == updated(page)


def test_the_example_prints_what_the_page_shows():
    """The subject on the page is run, and both blocks are what it prints (durations and noise apart)."""
    spec = importlib.util.spec_from_file_location(
        "readme_blocks", README.parent / "tests" / "readme_blocks.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = README.read_text(encoding="utf-8")

    for name, text in tool.blocks(page).items():
        shown = tool.between(name).search(page)[2].strip()
        assert tool.steady(shown) == tool.steady(text)


def test_the_table_of_frameworks_is_what_was_measured():
    """The block says what reports/conformance/conformance.json says, cell by cell."""
    root = README.parent
    spec = importlib.util.spec_from_file_location(
        "conformance_table", root / "tests" / "conformance" / "table.py"
    )
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    measured = json.loads((root / "reports" / "conformance" / "conformance.json").read_text())
    page = README.read_text(encoding="utf-8")

    assert page.count(tool.BEGIN) == page.count(tool.END) == 1
    assert page == tool.updated(page, measured)
    assert (root / "reports" / "conformance" / "conformance.md").read_text() == tool.markdown(
        measured
    )
