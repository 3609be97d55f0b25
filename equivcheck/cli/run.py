"""Compare accumulated micro-batches with the full batch, for each target and K.

A target is FILE.py, FILE.py:ATTRIBUTE, package.module or
package.module:ATTRIBUTE with build(), batches() and train(...).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from equivcheck import result as results
from equivcheck.api import Job, outcomes, plan
from equivcheck.cli import selection
from equivcheck.cli.outputs import Outputs
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
    parser.add_argument("--show-config", action="store_true", help="print every option's origin")
    parser.add_argument("--full", metavar="CMD", help="an unmodified script on the full batch")
    parser.add_argument(
        "--accumulated",
        metavar="CMD",
        action="append",
        help="and in micro-batches; may be repeated",
    )
    parser.add_argument(
        "--versions", metavar="A,B", help="--full under two interpreters or environments instead"
    )


def execute(options: argparse.Namespace) -> int:
    """Run the cases and return the exit code of the whole."""
    settings = resolve(flags(options))
    if options.show_config:
        print("\n".join(settings.lines()))
        return 0
    if options.full or options.accumulated or options.versions:
        options.targets = _scripts(options, settings)
    else:
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
    if failure is not None:
        raise failure
    return int(result["exit_code"])


def _scripts(options: argparse.Namespace, settings: Settings) -> list[Any]:
    """Return the command lines as targets.

    Raises:
        UsageError: There are targets beside them, an option that command lines have themselves, or a bad command.
    """
    if options.targets:
        raise UsageError(
            f"{options.targets[0]} stands beside --full",
            expected="targets, or command lines",
            fix="run the two one after the other",
        )
    own = ("accumulation_steps", "split", "world_size", "strategy", "precision", "train")
    for name in own:
        if settings.stated(name):
            raise UsageError(
                f"{OPTIONS[name].flag} with --full: the command lines say it themselves",
                where=settings.origins[name],
                expected="options of the script inside its command line",
            )
    from equivcheck.scripts.target import scripts_of  # noqa: PLC0415 - torch is loaded only to run

    return list(
        scripts_of(
            options.full, options.accumulated or [], options.versions, settings["optimizer_steps"]
        )
    )


def refuse_targets(targets: list[str]) -> None:
    """Refuse an empty command line.

    Raises:
        UsageError: No target.
    """
    if not targets:
        raise UsageError(
            "no target given",
            expected="a file or module with build, batches and train",
            fix="equivcheck init, then equivcheck run train_step.py",
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
                stated=settings.stated,
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
            target=" ".join(map(str, self._options.targets)),
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
