"""The examples for projects that use a framework, in that framework's environment."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "plugin" / "examples"


@pytest.mark.transformers
def test_the_example_of_transformers(pytester):
    """Trainer is equivalent under the fixture, and the example collects what it checks."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs the environment of that name: make env-transformers")
    shutil.copy(EXAMPLES / "test_transformers_trainer.py", pytester.path)

    found = pytester.runpytest_subprocess("-p", "no:randomly", "-p", "no:cacheprovider")

    found.assert_outcomes(passed=1)
    found.stdout.fnmatch_lines(["equivcheck: 2 cases equivalent, margin >= *"])
