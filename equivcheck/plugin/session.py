"""What one pytest session has found: gathered from its workers, told once, written once."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from equivcheck import api
from equivcheck import result as results
from equivcheck.config import Settings, resolve
from equivcheck.errors import UsageError
from equivcheck.plugin import facts, slots, words
from equivcheck.report import github, html

# Cases remembered from earlier sessions, for --equivcheck-replay; some hundred bytes each.
REMEMBERED = 2000
CACHE = "equivcheck/cases"


class Session:
    """The checks of one session; in a worker of pytest-xdist those of that worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.settings = _settings(config)
        self._worker = getattr(config, "workerinput", None)
        self._folder: Path | None = None
        self._made: Path | None = None
        if self._worker is not None and "equivcheck_folder" in self._worker:
            self._folder = Path(self._worker["equivcheck_folder"])
        self._cases: dict[str, list[Mapping[str, Any]]] = {}
        self._written: list[str] = []
        self._failures: list[str] = []
        self._replay: str | None = config.getoption("equivcheck_replay")
        # Reports arrive here from every worker, and this very process is the one that tells them.
        self.reports = facts.Reports()
        if self._worker is None:
            config.pluginmanager.register(self.reports, "equivcheck-reports")
            self._refuse_unwritable()

    # ---- before the tests ----------------------------------------------------------------------

    def _refuse_unwritable(self) -> None:
        """Refuse a report that cannot be written before minutes are spent on it.

        Raises:
            pytest.UsageError: With the reason that the system gives.
        """
        for name in () if self.config.option.collectonly else ("json", "html"):
            path = self._path(name)
            if path is None:
                continue
            try:
                if path.is_dir():
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
                path.parent.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=path.parent):  # where the page will be drafted
                    pass
            except OSError as error:
                raise pytest.UsageError(
                    f"cannot write --equivcheck-{name} {self._named(name)}: {error.strerror}"
                ) from None

    def _named(self, name: str) -> str | None:
        """Return the path of a report as it was stated; None where there is to be none."""
        path = self.config.getoption(f"equivcheck_{name}") or self.settings[name]
        return None if path in (None, "-") else str(path)

    def _path(self, name: str) -> Path | None:
        path = self._named(name)
        return None if path is None else self.config.invocation_params.dir / path

    def check_markers(self, item: pytest.Item, *, asks: bool) -> None:
        """Refuse markers that say nothing, or something wrong.

        Raises:
            pytest.UsageError: With the test, the keyword and the closest one.
        """
        from equivcheck.plugin.checker import refuse_marker  # noqa: PLC0415 - it needs this module

        try:
            for marker in item.iter_markers("equivcheck"):
                refuse_marker(item, marker, asks=asks)
        except UsageError as error:
            raise pytest.UsageError(str(error)) from None

    def replayed(self, asking: Sequence[pytest.Item]) -> list[pytest.Item]:
        """Return the tests in which the case to replay may be: the one on record, or all that take the fixture."""
        known = self._remembered()
        assert self._replay is not None
        found = {
            entry["test"]
            for case, entry in known.items()
            if case.startswith(self._replay.lower()) and isinstance(entry, dict)
        }
        kept = [item for item in asking if item.nodeid in found]
        return kept or list(asking)

    # ---- during a test -------------------------------------------------------------------------

    def allowed(self, jobs: Sequence[api.Job]) -> tuple[list[api.Job], list[str]]:
        """Return the cases that may run here, and what is left out and why; skip the test if nothing is left.

        Only the case to replay, if one is; and none with more ranks than the session allows.
        """
        chosen = list(jobs)
        if self._replay is not None:
            chosen = [job for job in jobs if job.case.id.startswith(self._replay.lower())]
            if jobs and not chosen:
                pytest.skip(f"equivcheck: no case {self._replay} here")
        most = self.max_ranks
        fitting = [job for job in chosen if job.case.world_size <= most]
        above = sorted(
            {job.case.world_size for job in chosen} - {j.case.world_size for j in fitting}
        )
        reasons = [
            f"world_size {size} needs --equivcheck-max-ranks {size}, {most} are allowed here"
            for size in above
        ]
        if above and not fitting:
            pytest.skip(f"equivcheck: {reasons[0]}")
        return fitting, reasons

    @property
    def max_ranks(self) -> int:
        """Most processes that the checks of the whole session may use at a time."""
        given: int | None = self.config.getoption("equivcheck_max_ranks")
        return given or os.cpu_count() or 1

    @contextmanager
    def ranks(self, world_size: int) -> Iterator[None]:
        """Wait until so many more processes are allowed, with all the workers of this session counted."""
        if world_size == 1 or self._folder is None:
            yield
            return
        with slots.taken(self._folder, world_size, self.max_ranks):
            yield

    def note(self, item: pytest.Item, found: api.Result) -> None:
        """Keep the cases of a result, and say in the test's report what they are."""
        known = self._cases.setdefault(item.nodeid, [])
        for case in found.cases:
            entry = {**case, "test": item.nodeid}
            known.append(entry)
            item.user_properties += facts.properties(entry)
            self._save(item, entry, len(known))
        notes = found.data.get("notes") or ()
        page = words.section(found.cases, notes, full=self.config.get_verbosity() > 0)
        if page:
            item.add_report_section("call", "equivcheck", page)

    def _save(self, item: pytest.Item, case: Mapping[str, Any], number: int) -> None:
        if self._worker is None or self._folder is None:
            return
        # Every worker has collected the same tests in the same order.
        place = item.session.items.index(item)
        with suppress(OSError):  # a worker on another machine has only the facts in its reports
            results.write_text(
                self._folder / f"{place:06}-{number:04}.json", json.dumps(results.finite(case))
            )

    # ---- after the tests -----------------------------------------------------------------------

    def gather(self) -> Path:
        """Return the folder in which workers leave their cases."""
        if self._folder is None:
            self._folder = self._made = Path(tempfile.mkdtemp(prefix="equivcheck-"))
        return self._folder

    def result(self) -> dict[str, Any]:
        """Return the result of the session, its cases in the order of their tests."""
        cases = [case for each in self._cases.values() for case in each]
        if self._made is not None:
            for path in sorted(self._made.glob("*.json")):
                with suppress(OSError, ValueError):
                    cases.append(json.loads(path.read_text(encoding="utf-8")))
        for case in cases:
            if isinstance(case, dict):
                case["outcome"] = self.reports.outcome(str(case["test"]))
        return results.assemble(cases, target=" ".join(self.config.args) or "pytest")

    def finish(self, session: pytest.Session) -> None:
        """Write the reports asked for and remember the cases; a worker leaves that to the controller."""
        if self._worker is not None or self.config.option.collectonly:
            return
        result = self.result()
        if result["cases"]:
            self._write("json", results.to_json(result))
            self._write("html", html.render(result))
            self._remember(result["cases"])
            self._annotate(result)
        if self._failures and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        if self._replay is not None and not result["cases"]:
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def tell(self, terminal: Any) -> None:
        """Print the summary: one line if all is well."""
        if self._worker is not None or self.config.option.collectonly:
            return
        lines = words.summary(self.reports, paths=self._written)
        if self._replay is not None:
            lines += self._outcome_of_replay()
        for name in ("json", "html"):
            if self.config.getoption(f"equivcheck_{name}") and not self.reports.facts:
                lines.append(f"no check ran: --equivcheck-{name} wrote nothing")
        lines += self._failures
        terminal.ensure_newline()
        if len(lines) == 1:
            terminal.write_line(lines[0])
        elif lines:
            terminal.section("equivcheck")
            for line in lines:
                terminal.write_line(line)
        for command in self._commands:
            terminal.write_line(command)

    def close(self) -> None:
        """Remove the folder that was made for workers."""
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
        if self._worker is None and not self.config.pluginmanager.has_plugin("terminalreporter"):
            capture = self.config.pluginmanager.getplugin("capturemanager")
            off = capture.global_and_fixture_disabled() if capture else contextlib.nullcontext()
            with off:
                for command in self._commands:
                    print(command, file=sys.__stdout__, flush=True)

    _commands: Sequence[str] = ()

    def _annotate(self, result: Mapping[str, Any]) -> None:
        """Prepare the annotations of a GitHub workflow and write its step summary; tests that passed say nothing."""
        if not github.is_wanted(self.settings["github"]):
            return
        failed = [case for case in result["cases"] if case["outcome"] == "failed"]
        self._commands = github.commands({**result, "cases": _one_per_cause(failed)})
        try:
            github.append_summary(result)
        except OSError as error:
            self._failures.append(f"no step summary: {error.strerror}")

    def _write(self, name: str, text: str) -> None:
        path, shown = self._path(name), self._named(name)
        if path is None:
            return
        try:
            results.write_text(path, text)
        except OSError as error:
            self._failures.append(f"cannot write --equivcheck-{name} {shown}: {error.strerror}")
        else:
            self._written.append(str(shown))

    def _remembered(self) -> dict[str, Any]:
        cache = getattr(self.config, "cache", None)
        known = cache.get(CACHE, {}) if cache is not None else {}
        return known if isinstance(known, dict) else {}

    def _remember(self, cases: Sequence[Mapping[str, Any]]) -> None:
        cache = getattr(self.config, "cache", None)
        if cache is None:
            return
        known = self._remembered()
        self._before = {case["id"]: known.get(case["id"]) for case in cases}
        for case in cases:
            known.pop(case["id"], None)
            known[case["id"]] = {"test": case["test"], "verdict": case["verdict"]}
        cache.set(CACHE, dict(list(known.items())[-REMEMBERED:]))

    _before: Mapping[str, Any] = {}

    def _outcome_of_replay(self) -> list[str]:
        """Say what became of the replayed case, in the words of `equivcheck replay`."""
        found = [case for each in self.reports.facts.values() for case in each]
        if not found:
            return [f"no case {self._replay} in the tests that ran"]
        lines = []
        for case in found:
            was = (self._before.get(case["case_id"]) or {}).get("verdict")
            good = ("equivalent", "expected")
            word = "SAME" if was == case["verdict"] else case["verdict"].upper()
            if case["verdict"] in good and was not in (None, *good):
                word = "FIXED"
            elif case["verdict"] == was == "divergent":
                word = "STILL DIVERGENT"
            lines.append(f"{word}  {case['case_id']}" + (f"  (was {was})" if was else ""))
        return lines


def _settings(config: pytest.Config) -> Settings:
    """Return the options of [tool.equivcheck] and the environment.

    Raises:
        pytest.UsageError: They are wrong.
    """
    try:
        return resolve({"seed": config.getoption("equivcheck_seed")}, folder=config.rootpath)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from None


def _one_per_cause(cases: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the first case of each cause at each place: ten parametrized tests are one annotation."""
    found: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for case in cases:
        codes = tuple(cause["code"] for cause in case.get("causes") or ())
        found.setdefault((codes[:1] or case["verdict"], case.get("location")), case)
    return list(found.values())
