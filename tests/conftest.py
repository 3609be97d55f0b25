"""What every test shares: one thread, fixed seeds, hypothesis without deadlines, the detection matrix."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Runs pytest within pytest, for the tests of the plugin; only a conftest that is loaded first may name it.
pytest_plugins = ["pytester"]

# Before anything imports torch or numpy: reductions change with the number of threads, and
# processes started by a test inherit it.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"

# Deadlines are the classic flake of tests with torch (PyTorch pull requests 26663 and 42871);
# derandomized, a failure is the same for everyone.
settings.register_profile("equivcheck", deadline=None, derandomize=True, database=None)
# More of them, and others every time: for a night, not for every commit.
settings.register_profile(
    "thorough", settings.get_profile("equivcheck"), max_examples=2000, derandomize=False
)
settings.load_profile("equivcheck")


@pytest.fixture(autouse=True)
def deterministic():
    """Start every test from the same random state; a test without torch stays without it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)


# What every mutant yields is collected, and printed as a matrix of mutants against cuts.
CELLS = pytest.StashKey[dict[str, dict[str, str]]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the cells of the matrix."""
    config.stash[CELLS] = {}


@pytest.fixture
def cell(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Return the mapping that a test writes its cell into: row, column, found."""
    written: dict[str, str] = {}
    yield written
    if written:
        rows = request.config.stash[CELLS]
        rows.setdefault(written["row"], {})[written["column"]] = written["found"]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print mutants against cuts: the codes found, `-` where the fault has no effect and none was found."""
    rows = config.stash[CELLS]
    if not rows:
        return
    columns = sorted({column for row in rows.values() for column in row})
    terminalreporter.section("detection matrix")
    terminalreporter.write_line(f"{'mutant':<44}" + "".join(f"{column:>14}" for column in columns))
    for name, row in sorted(rows.items()):
        terminalreporter.write_line(
            f"{name[:43]:<44}" + "".join(f"{row.get(c, ''):>14}" for c in columns)
        )
