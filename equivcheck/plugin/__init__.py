"""The pytest plugin: fixture and marker `equivcheck`, five options, one report for a whole session.

A run that does not use it pays for this module alone, which imports nothing but pytest: everything else is loaded by
the first test that asks for the fixture, and torch by the first check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from equivcheck.plugin.checker import Checker
    from equivcheck.plugin.session import Session

MARKER = (
    "equivcheck(**options): options of the checks in this test, as in"
    " equivcheck(accumulation_steps=[2, 4], split='uneven', expect=['EQ201'])"
)
_SESSION = pytest.StashKey["Session"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the five options; all else is [tool.equivcheck] of pyproject.toml, as on the command line."""
    group = parser.getgroup("equivcheck", "equivcheck: accumulated micro-batches against full ones")
    add = group.addoption
    add("--equivcheck-html", metavar="PATH", help="write one page about all checks")
    add("--equivcheck-json", metavar="PATH", help="write the result of all checks")
    add("--equivcheck-replay", metavar="CASE_ID", help="run one case again, and no other test")
    add("--equivcheck-max-ranks", metavar="N", type=_at_least(1), help=_MAX_RANKS)
    add("--equivcheck-seed", metavar="N", type=_at_least(0), help="seed of every check")


_MAX_RANKS = "most processes that checks may use together (default: cores)"


def _at_least(least: int) -> Any:
    def parse(value: str) -> int:
        number = int(value) if value.isascii() and value.isdigit() else least - 1
        if number < least:
            raise pytest.UsageError(f"{value!r} is no whole number of at least {least}")
        return number

    return parse


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", MARKER)


def session_of(config: pytest.Config) -> Session:
    """Return what this session has found, made when it is first needed."""
    if _SESSION not in config.stash:
        from equivcheck.plugin.session import Session  # noqa: PLC0415 - only where it is used

        config.stash[_SESSION] = Session(config)
    return config.stash[_SESSION]


def _used(config: pytest.Config) -> Session | None:
    return config.stash.get(_SESSION, None)


@pytest.fixture(name="equivcheck")
def _equivcheck(request: pytest.FixtureRequest) -> Iterator[Checker]:
    """Check that accumulating micro-batches gives the update of the full batch."""
    from equivcheck.plugin.checker import Checker  # noqa: PLC0415 - only where it is used

    checker = Checker(request.node, session_of(request.config))
    yield checker
    checker.close()


def _asks(item: pytest.Item) -> bool:
    return "equivcheck" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check markers and configuration before anything runs, and keep only the test of a case to replay."""
    marked = [item for item in items if item.get_closest_marker("equivcheck")]
    asking = [item for item in items if _asks(item)]
    wanted = config.getoption("equivcheck_replay")
    if not (marked or asking or wanted):
        return
    session = session_of(config)
    for item in marked:
        session.check_markers(item, asks=_asks(item))
    if wanted:
        kept = session.replayed(asking)
        gone = [item for item in items if item not in kept]
        if gone:
            config.hook.pytest_deselected(items=gone)
        items[:] = kept


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say the version, with -v only."""
    if config.get_verbosity() <= 0:
        return None
    from importlib.metadata import version  # noqa: PLC0415 - takes milliseconds

    return f"equivcheck: {version('equivcheck')}"


def pytest_report_collectionfinish(
    config: pytest.Config, start_path: Path, items: list[pytest.Item]
) -> str | None:
    """Say how many tests are checks, if any are."""
    del config, start_path
    count = sum(map(_asks, items))
    return (
        f"equivcheck: {count} test{'s check' if count > 1 else ' checks'} accumulation"
        if count
        else None
    )


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """Note the cases behind a divergence that a test met without the fixture."""
    error = call.excinfo.value if call.excinfo is not None else None
    if error is not None and type(error).__name__ == "DivergenceError":
        found = getattr(error, "result", None)
        # The fixture has noted its cases, with their test.
        if found is not None and not any("test" in case for case in found.cases):
            session_of(item.config).note(item, found)
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist where the session's results are gathered."""
    session = session_of(node.config)
    node.workerinput["equivcheck_folder"] = str(session.gather())


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the reports, once."""
    found = _used(session.config)
    if found is not None:
        found.finish(session)


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what the checks found; nothing if there were none."""
    found = _used(config)
    if found is not None:
        found.tell(terminalreporter)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what was gathered."""
    found = _used(config)
    if found is not None:
        found.close()
