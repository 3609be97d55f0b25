"""The examples: what a project copies is what runs here."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parent / "examples"


def test_the_workflow_does_what_it_says(pytester, clean, monkeypatch):
    """Its check step runs in a workflow's environment, and writes the single file that the next step uploads."""
    workflow = yaml.safe_load((EXAMPLES / "accumulation.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["equivcheck"]["steps"]
    [check] = [step["run"] for step in steps if step.get("name") == "Check"]
    [upload] = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    for name in ("train_step.py", "test_plain_loop.py"):
        shutil.copy(EXAMPLES / name, pytester.path)
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    import sys

    command = check.replace("pytest", f"{sys.executable} -m pytest -p no:randomly", 1)
    ended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)  # noqa: S602

    assert ended.returncode == 0, ended.stdout
    assert "::error" not in ended.stdout
    assert summary.read_text(encoding="utf-8").startswith("### equivcheck: expected")
    page = pytester.path / upload["with"]["path"]
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert upload["with"]["archive"] is False
    assert upload["if"] == "always()"


def test_the_trainer_is_skipped_loudly_without_transformers():
    """The reason says what to install; with it, the example itself is one of these tests."""
    text = (EXAMPLES / "test_transformers_trainer.py").read_text(encoding="utf-8")

    assert "needs transformers" in text
    with pytest.raises(pytest.skip.Exception, match="is not there"):
        pytest.importorskip("transformers_that_nobody_has", reason="is not there")
