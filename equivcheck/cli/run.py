"""Compare accumulated micro-batches with the full batch, for each target and K.

A target is FILE.py, FILE.py:ATTRIBUTE, package.module or
package.module:ATTRIBUTE with build(), batches() and train(...).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from equivcheck import result as results
from equivcheck.api import Job, outcomes, plan
from equivcheck.cli import selection
from equivcheck.cli.outputs import LATEST, Outputs, open_page
from equivcheck.cli.parser import add_options, flags
from equivcheck.cli.screen import Progress, colored, own_stdout, say
from equivcheck.config import OPTIONS, Settings, resolve
from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.report import text, words

HELP = "check training loops"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("targets", metavar="TARGET", nargs="*", default=[])
    add_options(parser, *OPTIONS)
    parser.add_argument("-k", metavar="EXPR", dest="select", help="only cases that match")
    parser.add_argument("-x", action="store_true", dest="stop", help="stop at the first failure")
    parser.add_argument("-q", action="store_true", dest="quiet", help="failures and summary only")
    parser.add_argument("-v", action="store_true", dest="verbose", help="a block for every case")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    parser.add_argument("--show-config", action="store_true", help="print every option's origin")
    for flag in ("--full", "--accumulated"):
        parser.add_argument(flag, metavar="CMD", help="not supported in this version")


def execute(options: argparse.Namespace) -> int:
    """Run the cases and return the exit code of the whole."""
    settings = resolve(flags(options))
    if options.open and not settings["html"]:
        options.html = str(LATEST / "report.html")
        settings = resolve(flags(options))
    if options.show_config:
        print("\n".join(settings.lines()))
        return 0
    if options.full or options.accumulated:
        raise UsageError(
            "--full and --accumulated are not supported in this version",
            expected="a target with build, batches and train",
            fix="equivcheck init writes one to start from",
        )
    settings.refuse_unsupported()
    refuse_targets(options.targets)
    match = selection.compiled(options.select)
    outputs = Outputs(settings)
    with own_stdout() as stdout:
        out = sys.stderr if outputs.json_on_stdout else stdout
        run = _Run(options, settings, outputs, out)
        failure = run.cases_of(match)
        if failure is not None and not run.started:
            raise failure
        result = run.result()
        run.tell(result)
        outputs.finish(result, stdout)
        if options.open and settings["html"] != "-":
            open_page(settings["html"])
    if failure is not None:
        raise failure
    return int(result["exit_code"])


def refuse_targets(targets: list[str]) -> None:
    """Refuse what this version does not load.

    Raises:
        UsageError: No target, a suite, or a folder.
    """
    if not targets:
        raise UsageError(
            "no target given",
            expected="a file or module with build, batches and train",
            fix="equivcheck init, then equivcheck run train_step.py",
        )
    for target in targets:
        if target.startswith("suite:") or Path(target).is_dir():
            raise UsageError(
                f"{target} is a suite or folder; this version runs single subjects",
                expected="FILE.py, FILE.py:ATTRIBUTE, package.module or package.module:ATTRIBUTE",
                fix=f"equivcheck run {target.rstrip('/')}/*.py" if Path(target).is_dir() else None,
            )


class _Run:
    """One run of the command: its cases so far and how they are shown."""

    def __init__(
        self, options: argparse.Namespace, settings: Settings, outputs: Outputs, out: TextIO
    ) -> None:
        self._options, self._settings, self._outputs, self._out = options, settings, outputs, out
        self._paint = text.ansi if colored(settings["color"], out) else text.plain
        self._cases: list[Mapping[str, Any]] = []
        self._notes: list[str] = []
        self._interrupted = False
        self._shown_target: str | None = None

    def cases_of(self, match: selection.Match | None) -> EquivcheckError | None:
        """Run what is selected; return the usage error that ended it, if one did."""
        settings = self._settings
        try:
            if not self._options.quiet:
                say(self._out, text.header(results.environment(), settings["seed"]))
            planned, self._notes = plan(
                self._options.targets,
                settings.values,
                explicit=settings.stated("accumulation_steps"),
            )
            jobs = [job for job in planned if selection.selected(job.case, match)]
            if planned and not jobs:
                known = ", ".join(job.case.label for job in planned[:8])
                self._notes.append(f"-k {self._options.select} matches none of: {known}")
            self._run(jobs)
        except KeyboardInterrupt:
            self._interrupted = True
        except EquivcheckError as error:
            return error
        return None

    @property
    def started(self) -> bool:
        """Whether any case has finished; if none has, the last run's result is left alone."""
        return bool(self._cases)

    def result(self) -> dict[str, Any]:
        """Return the result so far."""
        return results.assemble(
            self._cases,
            target=" ".join(self._options.targets),
            notes=self._notes,
            interrupted=self._interrupted,
        )

    def tell(self, result: Mapping[str, Any]) -> None:
        """Print the blocks of what failed, the notes and the summary."""
        for case in result["cases"]:
            if words.failed(case) or self._options.verbose:
                say(self._out, "\n" + text.block(case, self._paint))
        for remark in text.remarks(result):
            say(self._out, remark)
        say(self._out, "\n" + text.summary(result))

    def _run(self, jobs: list[Job]) -> None:
        progress = Progress(len(jobs), quiet=self._options.quiet)
        with progress.shown():
            for job in jobs:
                progress.begin(job.case.label)
                [case] = outcomes(
                    [job],
                    expect=self._settings["expect"],
                    timeout=self._settings["timeout"],
                    progress=progress,
                )
                self._cases.append(case)
                with progress.paused():
                    self._line(case)
                self._outputs.save(self.result())
                if self._options.stop and words.failed(case):
                    self._notes.append("stopped at the first failure (-x)")
                    break

    def _line(self, case: Mapping[str, Any]) -> None:
        if self._options.quiet and not words.failed(case):
            return
        if case["target"] != self._shown_target:
            self._shown_target = case["target"]
            say(self._out, f"\n{text.printable(case['target'])}")
        say(self._out, text.line(case, self._paint))
