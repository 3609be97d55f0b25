"""Results: verdict and exit code of a run, JSON without NaN, atomic files."""

from __future__ import annotations

import json
import math
import os
import stat
from importlib import metadata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equivcheck import result
from equivcheck.errors import UsageError


def case(verdict, **more):
    return {"id": "0123456789", "verdict": verdict, **more}


INTERNAL = case("error", error={"exit_code": 70})
PROVED = [{"code": "EQ201", "status": "proved"}]


@pytest.mark.parametrize(
    ("cases", "interrupted", "verdict", "code"),
    [
        ([], False, "invalid", 5),
        ([case("equivalent")], False, "equivalent", 0),
        ([case("equivalent"), case("expected")], False, "expected", 0),
        ([case("equivalent"), case("invalid")], False, "invalid", 4),
        ([case("invalid"), case("inconclusive")], False, "inconclusive", 4),
        ([case("inconclusive"), case("precision-loss")], False, "precision-loss", 1),
        ([case("precision-loss"), case("divergent")], False, "divergent", 1),
        ([case("divergent"), case("error")], False, "error", 3),
        ([case("divergent")], True, "error", 130),
        ([], True, "error", 130),
        ([INTERNAL, case("error")], True, "error", 70),
        ([case("error", error={"exit_code": 9})], False, "error", 3),
        ([case("equivalent", expect=["EQ201"])], False, "divergent", 1),
        ([case("expected", expect=["EQ201"], causes=PROVED)], False, "expected", 0),
    ],
)
def test_the_most_pressing_case_decides(cases, interrupted, verdict, code):
    """70, 130, 3, 1, 4, 5, 0: the first that applies, for verdict and exit code alike."""

    assert result.run_verdict(cases, interrupted=interrupted) == verdict
    assert result.exit_code(cases, interrupted=interrupted) == code


def theory(verdict, met, *causes):
    return {"verdict": verdict, "causes": list(causes), "met": met}


@pytest.mark.parametrize(
    ("one", "code"),
    [
        (case("divergent", theory=theory("divergent", True)), 0),
        (case("divergent", theory=theory("equivalent", False)), 1),
        (case("equivalent", theory=theory("divergent", False)), 1),
        (case("invalid", theory=theory("equivalent", False)), 4),
    ],
)
def test_theory_decides_the_exit_code_of_a_case(one, code):
    """What is expected is a success whatever it is, and what is not expected is none in either direction."""
    assert result.case_exit_code(one) == code


@pytest.mark.parametrize(
    ("found", "causes", "expected", "met", "verdict"),
    [
        ("equivalent", [], theory("equivalent", None), True, "equivalent"),
        ("divergent", PROVED, theory("divergent", None, "EQ201"), True, "expected"),
        ("expected", PROVED, theory("divergent", None, "EQ201"), True, "expected"),
        ("divergent", PROVED, theory("divergent", None, "EQ103"), False, "divergent"),
        ("divergent", PROVED, theory("equivalent", None), False, "divergent"),
        (
            "divergent",
            [{"code": "EQ201", "status": "suspected"}],
            theory("divergent", None, "EQ201"),
            False,
            "divergent",
        ),
    ],
)
def test_a_finished_case_is_held_against_theory(found, causes, expected, met, verdict):
    """Verdict and causes have to be those of theory, and each proved."""
    one = case(found, causes=causes)
    result.hold_against_theory(one, expected)
    assert one["theory"]["met"] is met
    assert one["verdict"] == verdict


@given(st.lists(st.sampled_from([case(verdict) for verdict in result.EXIT_CODES])))
def test_only_good_cases_make_a_good_run(cases):
    """Exit code 0 means that there were cases, and all of them passed."""
    good = bool(cases) and all(c["verdict"] in ("equivalent", "expected") for c in cases)

    assert (result.exit_code(cases) == 0) == good


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_anything_becomes_strict_json(value):
    """No parser meets NaN or Infinity."""
    json.loads(result.to_json({"value": value}), parse_constant=pytest.fail)


def test_non_finite_numbers_are_marked():
    """Null for infinity stays different from null for nothing."""
    shown = result.finite({"a": {"relative": math.inf, "scale": 1.0}, "b": {"w": [1, math.nan]}})

    assert shown == {
        "a": {"relative": None, "scale": 1.0, "finite": False},
        "b": {"w": [1, None], "finite": False},
    }


def test_a_result_survives_the_disk(tmp_path):
    """What is written is what is read, folders made, no draft left."""
    path = tmp_path / "deep" / "result.json"
    found = result.assemble([case("equivalent")], target="t.py")
    result.write(path, found)
    result.write(path, found)

    assert result.load(path) == found
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """A reader sees the old result or the new one."""
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        result.write_text(path, "new")

    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_links_and_permissions_are_kept(tmp_path):
    """A link to a result stays one; a new file has ordinary permissions."""
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    result.write_text(link, "new")

    assert link.is_symlink()
    assert real.read_text(encoding="utf-8") == "new"
    assert stat.S_IMODE(real.stat().st_mode) & stat.S_IRUSR


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("", "is not JSON"),
        ('{"schema": "equivcheck.result/1", "cases": [', "is not JSON"),
        ("hello", "because   it is text of another kind"),
        ('{"schema": "equivcheck.result/1", "cases": [', "because   the file is cut short"),
        ('{"schema": "equivcheck.result/1", "seconds": NaN, "cases": []}', "it holds NaN"),
        ('{"schema": "equivcheck.result/1", "exit_code": 1e999, "cases": []}', "out of range"),
        ('{"a": 1,, "b": 2}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "no result: it is a list, not a table"),
        ("{}", "has no schema"),
        ('{"schema": "equivcheck.result/9"}', "has the schema 'equivcheck.result/9'"),
        ('{"schema": "equivcheck.result/1"}', "has no 'cases'"),
        ('{"schema": "equivcheck.result/1", "cases": [{"id": "a"}]}', "has no 'verdict'"),
        (
            '{"schema": "equivcheck.result/1", "cases": [{"id": "a", "verdict": "so"}]}',
            "an unknown",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, content, told):
    """Each with what is wrong about it."""
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=told):
        result.load(path)


def test_a_mark_at_the_beginning_is_no_fault(tmp_path):
    """Editors on Windows put one there."""
    path = tmp_path / "result.json"
    text = result.to_json(result.assemble([case("equivalent")], target="a.py"))
    path.write_text(text, encoding="utf-8-sig")

    assert result.load(path)["verdict"] == "equivalent"


def test_an_absent_verdict_is_that_of_the_cases(tmp_path):
    """It is made of nothing else."""
    whole = result.assemble([case("divergent")], target="a.py")
    del whole["verdict"]
    result.write(tmp_path / "result.json", whole)

    assert result.load(tmp_path / "result.json")["verdict"] == "divergent"


def test_bytes_are_refused(tmp_path):
    """A binary file is a usage error too."""
    path = tmp_path / "result.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        result.load(path)


def test_numbers_of_other_libraries_become_plain_ones():
    """And what JSON has no type for becomes its text."""
    import numpy as np

    plain = result.finite({"count": np.int64(3), "size": np.float32(0.5), "kind": np.dtype("int8")})

    assert plain == {"count": 3, "size": 0.5, "kind": "int8"}
    assert [type(value) for value in plain.values()] == [int, float, str]


def test_a_version_that_is_not_installed_is_null(monkeypatch):
    """The reports are rendered without torch."""

    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)

    assert result.environment()["torch"] is None


def test_a_pipe_is_written_to_and_a_folder_refused(tmp_path):
    """Neither can be replaced by a file."""
    read, write = os.pipe()
    try:
        result.write_text(f"/dev/fd/{write}", "text")
        assert os.read(read, 16) == b"text"
    finally:
        os.close(read)
        os.close(write)
    with pytest.raises(IsADirectoryError):
        result.write_text(tmp_path, "text")
