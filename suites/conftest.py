"""Lets `pytest suites/` run every case of every suite as a test of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from equivcheck.api import Job, outcomes, plan
from equivcheck.config import OPTIONS
from equivcheck.report import text, words
from equivcheck.suite import is_suite


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect a suite."""
    return SuiteFile.from_parent(parent, path=file_path) if is_suite(str(file_path)) else None


class SuiteFile(pytest.File):
    """A suite: its cases are planned when it is collected, and run one by one."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the cases."""
        values = {name: option.default for name, option in OPTIONS.items()}
        jobs, _ = plan([str(self.path)], values, explicit=False)
        for job in jobs:
            yield CaseItem.from_parent(self, name=job.case.label.replace(" ", "-"), job=job)


class CaseItem(pytest.Item):
    """A case: it fails where its result differs from theory."""

    def __init__(self, *, job: Job, **more: object) -> None:
        super().__init__(**more)
        self._job = job

    def runtest(self) -> None:
        """Run it."""
        [case] = outcomes([self._job])
        assert not words.failed(case), text.block(case)

    def repr_failure(
        self, failure: pytest.ExceptionInfo[BaseException], style: object = None
    ) -> str:
        """Return the block of the case."""
        del style
        return str(failure.value)
