"""The few facts about a case that travel in a test's report: over xdist, and into JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from equivcheck.report import words
from equivcheck.result import missing_causes

PREFIX = "equivcheck."
UNUSED = "equivcheck.unused"


def properties(case: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return the user properties of a case; `equivcheck.case_id` is the first of each case's."""
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    facts = {
        "case_id": case["id"],
        "label": words.label(case),
        "verdict": case["verdict"],
        "cause": ",".join(words.codes(case)),
        "missing": ",".join(missing_causes(case)),
        "headline": words.headline(case),
        "scale": gradients.get("scale"),
        "relative": gradients.get("relative"),
        "margin": case.get("margin") if case["verdict"] == "equivalent" else None,
        "failed": "yes" if words.failed(case) else None,
        "replay": case.get("replay") if words.failed(case) else None,
    }
    return [(PREFIX + name, value) for name, value in facts.items() if value not in (None, "")]


def cases(properties: Sequence[tuple[str, object]]) -> list[dict[str, Any]]:
    """Return the facts of each case out of a report's user properties."""
    found: list[dict[str, Any]] = []
    for name, value in properties:
        if not str(name).startswith(PREFIX):
            continue
        key = str(name).removeprefix(PREFIX)
        if key == "case_id":
            found.append({})
        if found:
            found[-1][key] = value
    return found


class Reports:
    """The tests' reports as they come in, from this process or from workers."""

    def __init__(self) -> None:
        self.facts: dict[str, list[dict[str, Any]]] = {}
        self.unused: list[str] = []
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Read the facts of a test; those of its last phase are all of them."""
        found = cases(report.user_properties)
        if found:
            self.facts[report.nodeid] = found
        if report.when == "setup" or report.failed:
            self._outcomes[report.nodeid] = report.outcome
        elif report.when == "call":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self._outcomes[report.nodeid] = outcome
        is_unused = any(name == UNUSED for name, _ in report.user_properties)
        if is_unused and self.outcome(report.nodeid) == "passed":
            self.unused.append(report.nodeid)

    def outcome(self, test: str) -> str:
        """Return what became of a test: passed, failed, skipped or xfailed."""
        return self._outcomes.get(test, "passed")
