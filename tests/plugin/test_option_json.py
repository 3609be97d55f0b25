"""--equivcheck-json PATH: the result of all checks of the session."""

from __future__ import annotations

import json

import pytest

import equivcheck

SOURCE = """
def test_good(equivcheck):
    equivcheck('good.py', accumulation_steps=2)

def test_bad(equivcheck):
    equivcheck('EQ101.py', accumulation_steps=4)
"""


def test_it_writes_one_result(stubbed, pytester):
    """Every case has its test and what became of that."""
    found = stubbed(SOURCE, "--equivcheck-json=out/r.json")
    result = equivcheck.load_result(str(pytester.path / "out" / "r.json"))

    found.stdout.fnmatch_lines(["report    out/r.json"])
    assert (result.verdict, result.exit_code) == ("divergent", 1)
    assert [(c["test"].split("::")[1], c["verdict"], c["outcome"]) for c in result.cases] == [
        ("test_good", "equivalent", "passed"),
        ("test_bad", "divergent", "failed"),
    ]


@pytest.mark.parametrize("name", ["json", "html"])
@pytest.mark.parametrize("path", ["file/report", "folder"])
def test_a_path_that_cannot_be_written_is_refused(stubbed, pytester, ran, name, path):
    """Before anything runs, as by the command line."""
    (pytester.path / "file").write_text("", encoding="utf-8")
    pytester.mkdir("folder")
    found = stubbed(
        "def test_it(equivcheck):\n    equivcheck('good.py')\n", f"--equivcheck-{name}={path}"
    )

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines([f"ERROR: cannot write --equivcheck-{name} {path}: *"])
    assert ran == []


def test_a_path_that_is_lost_on_the_way_fails_the_run(stubbed):
    """The tests passed, but what was asked for is not there."""
    found = stubbed(
        """
        import pathlib

        def test_it(equivcheck):
            equivcheck('good.py')
            pathlib.Path("r.json").mkdir()
        """,
        "--equivcheck-json=r.json",
    )

    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stdout.fnmatch_lines(["cannot write --equivcheck-json r.json: *"])


def test_it_says_when_there_is_nothing_to_write(stubbed, pytester):
    """A job that uploads the file is told why it is missing."""
    found = stubbed("def test_it(equivcheck): ...\n", "--equivcheck-json=r.json")

    found.stdout.fnmatch_lines(["no check ran: --equivcheck-json wrote nothing"])
    assert not (pytester.path / "r.json").exists()


def test_the_old_file_is_whole_or_the_new_one_is(stubbed, pytester):
    """It is replaced, never appended to."""
    for _ in range(2):
        stubbed(SOURCE, "--equivcheck-json=r.json")

    assert len(json.loads((pytester.path / "r.json").read_text(encoding="utf-8"))["cases"]) == 2
