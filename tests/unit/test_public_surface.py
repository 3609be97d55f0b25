"""The public names, their signatures, and what importing them costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import equivcheck

SIGNATURE = (
    "(target: 'object' = None, *, build: 'Functions | None' = None, "
    "batches: 'Batches | None' = None, train: 'Functions | str | None' = None, "
    "objective: 'Functions | None' = None, "
    "accumulation_steps: 'Iterable[int] | int | None' = None, "
    "split: 'Iterable[str] | str' = 'even', world_size: 'Iterable[int] | int' = 1, "
    "strategy: 'Iterable[str] | str' = 'none', expect: 'Iterable[str] | str' = (), "
    "precision: 'Iterable[str] | str' = 'native', device: 'str' = 'cpu', "
    "optimizer_steps: 'int' = 8, rows: 'str | None' = None, "
    "rng: 'str' = 'off', seed: 'int' = 0, timeout: 'float | None' = None) -> 'Result'"
)


def test_the_public_names():
    """At most ten, sorted, all of them there."""

    assert equivcheck.__all__ == [
        "CAUSES",
        "Case",
        "DivergenceError",
        "EquivcheckError",
        "Result",
        "UsageError",
        "check",
        "load_result",
        "measure",
    ]
    assert all(getattr(equivcheck, name) is not None for name in equivcheck.__all__)
    assert set(equivcheck.__all__) <= set(dir(equivcheck))


@pytest.mark.parametrize("name", ["check", "measure"])
def test_signatures(name):
    """A change of these is a change for users."""

    assert str(inspect.signature(getattr(equivcheck, name))) == SIGNATURE


def test_an_unknown_name_is_an_attribute_error():
    """Lazy lookup does not swallow mistakes."""
    with pytest.raises(AttributeError, match="module 'equivcheck' has no attribute 'chek'"):
        equivcheck.chek  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import equivcheck",
        "import equivcheck; equivcheck.check, equivcheck.Case, equivcheck.CAUSES",
        "import equivcheck.report.text, equivcheck.config",
    ],
)
def test_importing_loads_no_torch(code):
    """Torch takes a second or two, and test runners import plugins at every start."""
    probe = f"{code}; import sys; print({{'torch', 'numpy', 'rich'}} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert told.stdout.strip() == "set()"


def test_the_probe_can_fail():
    """A module that does load torch is seen."""
    probe = "import torch, sys; print({'torch'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)

    assert told.stdout.strip() == "{'torch'}"
