"""Collects what every mutant yields, and prints it as the detection matrix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

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
