"""The catalogue is complete, ordered, and fits the screen."""

from __future__ import annotations

import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from equivcheck.causes import CAUSES, name_of

DESIGNED = set(
    """
EQ000 EQ101 EQ102 EQ103 EQ104 EQ105 EQ106 EQ107 EQ108 EQ109 EQ110 EQ201 EQ202 EQ203 EQ301 EQ302
EQ303 EQ304 EQ305 EQ306 EQ307 EQ308 EQ309 EQ310 EQ311 EQ312 EQ401 EQ402 EQ403 EQ404 EQ405 EQ501
EQ502 EQ503 EQ504 EQ505 EQ506 EQ507 EQ508 EQ601 EQ602 EQ603 EQ701
""".split()  # noqa: SIM905 - forty lines otherwise
)
MUTANTS = Path(__file__).parents[2] / "fixtures" / "mutants"


def test_every_code_is_there_once_and_in_order():
    """No code is lost or reused."""
    names = [cause.name for cause in CAUSES.values()]

    assert DESIGNED <= set(CAUSES)
    assert list(CAUSES) == sorted(CAUSES)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_an_entry_is_well_formed(cause):
    """Names are words with hyphens, sentences are whole, links name a repository and a number."""
    texts = (cause.summary, cause.because, cause.detected, cause.proved, cause.fix)

    assert re.fullmatch(r"EQ\d{3}", cause.code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cause.name)
    assert all(text and text == text.strip() and "\n" not in text for text in texts)
    assert not any(text.endswith(".") for text in texts), "shown in tables, without a full stop"
    assert all(len(line) <= 76 for line in cause.mathematics.splitlines())
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", issue) for issue in cause.seen_in_the_wild)


def test_code_and_name_leave_room_for_a_number():
    """Short summaries show 45 characters of a failure."""

    assert max(len(f"{c.code} {c.name}: ") + len("3e+00") for c in CAUSES.values()) <= 45


def test_every_mutant_is_named_by_a_known_code():
    """A folder of faults reads like the catalogue."""
    codes = {path.name[:5].upper() for path in MUTANTS.rglob("eq*.py")}

    assert codes <= set(CAUSES)


def test_a_code_of_a_later_version_has_a_name():
    """Old renderers show new results."""

    assert name_of("EQ999") == "unknown"


def test_the_table_of_a_page_is_rewritten_and_nothing_else(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("before <!-- begin: causes -->old<!-- end: causes --> after", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["causes", str(page)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # imported already, by another test
        runpy.run_module("equivcheck.causes", run_name="__main__")
    lines = page.read_text(encoding="utf-8").splitlines()

    assert lines[0] == "before <!-- begin: causes -->"
    assert lines[-1] == "<!-- end: causes --> after"
    assert [line[2:7] for line in lines[3:-1]] == list(CAUSES)
