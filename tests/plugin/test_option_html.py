"""--equivcheck-html PATH: one page about all checks of the session."""

from __future__ import annotations


def test_it_writes_one_page(stubbed, pytester):
    """With the causes of what failed, whatever folder it goes to."""
    found = stubbed(
        """
        def test_good(equivcheck):
            equivcheck('good.py')

        def test_bad(equivcheck):
            equivcheck('EQ306.py', accumulation_steps=4)
        """,
        "--equivcheck-html=out/report.html",
    )
    page = (pytester.path / "out" / "report.html").read_text(encoding="utf-8")

    found.stdout.fnmatch_lines(["report    out/report.html"])
    assert page.startswith("<!doctype html>")
    assert "EQ306" in page
    assert "test_bad" in page


def test_collecting_alone_writes_nothing(stubbed, pytester, ran):
    """`--collect-only` runs no check, writes no report and prints no summary."""
    found = stubbed(
        "def test_it(equivcheck):\n    equivcheck('good.py')\n",
        "--equivcheck-html=report.html",
        "--collect-only",
    )

    assert found.ret == 0
    assert ran == []
    assert not (pytester.path / "report.html").exists()
    found.stdout.no_fnmatch_line("*no check ran*")
