"""Compare accumulated micro-batches with the full batch, for each target and K.

A target is FILE.py, FILE.py:ATTRIBUTE, package.module or
package.module:ATTRIBUTE with build(), batches() and train(...).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import closing, nullcontext
from typing import Any, TextIO

from equivcheck import result as results
from equivcheck.api import Job, outcomes, plan, process_ended, require_device
from equivcheck.cli import selection
from equivcheck.cli.guard import case_finished
from equivcheck.cli.journal import Journal
from equivcheck.cli.outputs import LATEST, Outputs, open_page
from equivcheck.cli.parser import add_options, flags
from equivcheck.cli.screen import Progress, colored, error_block, own_stdout, say
from equivcheck.config import OPTIONS, Settings, resolve
from equivcheck.errors import EquivcheckError, UsageError
from equivcheck.ranks import launched
from equivcheck.ranks.launched import Launch
from equivcheck.ranks.server import start_server
from equivcheck.report import matrix, text, words
from equivcheck.workers import one_thread, side_by_side

HELP = "check training loops"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`."""
    parser.add_argument("targets", metavar="TARGET", nargs="*", default=[])
    add_options(parser, *OPTIONS)
    parser.add_argument("-k", metavar="EXPR", dest="select", help="only cases that match")
    parser.add_argument("-x", action="store_true", dest="stop", help="stop at the first failure")
    parser.add_argument("-q", action="store_true", dest="quiet", help="failures and summary only")
    parser.add_argument("-v", action="store_true", dest="verbose", help="a block for every case")
    parser.add_argument("--resume", action="store_true", help="go on where a run was ended")
    parser.add_argument("--shard", metavar="I/N", help="only the I-th of N parts of the cases")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
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
    """Run the cases and return the exit code of the whole, the same in every process of a launched group."""
    launch = launched.found()
    if launch is None:
        return _execute(options)
    from equivcheck.ranks import hosts  # noqa: PLC0415 - torch is loaded only to run

    if launch.rank:
        return hosts.serve(launch)
    with hosts.Hosts(launch) as others:
        others.code = _execute(options, launch)
        return others.code


def _execute(options: argparse.Namespace, launch: Launch | None = None) -> int:
    settings = resolve(flags(options))
    if launch is not None:
        settings = launched_settings(options, settings, launch)
    if options.open and not settings["html"]:
        options.html = str(LATEST / "report.html")
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
        unwritten: UsageError | None = None
        failure = run.cases_of(match)
        if failure is not None and not run.started:
            raise failure
        result = run.result()
        run.tell(result)
        try:
            outputs.finish(result, stdout)
        except UsageError as error:
            unwritten = error
        if options.open and settings["html"] != "-":
            open_page(settings["html"])
    if failure is not None:
        raise failure
    code = int(result["exit_code"])
    if unwritten is not None:
        if not code:
            raise unwritten
        error_block(unwritten)  # What was found counts more than a file that could not be written.
    return code


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


def launched_settings(options: argparse.Namespace, settings: Settings, launch: Launch) -> Settings:
    """Return the settings of a run in a launched group: as many ranks as it has processes.

    Raises:
        UsageError: Something was asked for that a launched group cannot do.
    """
    size = launch.world_size
    told = f"WORLD_SIZE is {size}: a launcher has started this process as one of {size}"
    if options.full or options.accumulated or options.versions:
        raise UsageError(
            "command lines in a launched group",
            where=told,
            expected="one process, and launchers inside the command lines",
            fix="equivcheck run --full 'torchrun ...' --accumulated 'torchrun ...'",
        )
    if settings.stated("world_size") and settings["world_size"] != (size,):
        shown = ",".join(map(str, settings["world_size"]))
        raise UsageError(
            f"{OPTIONS['world_size'].flag} {shown} in a group of {size} processes",
            where=f"{settings.origins['world_size']}; {told}",
            expected=f"{OPTIONS['world_size'].flag} {size}, or nothing",
            because="each process of the group is one rank",
            fix=f"start {shown.split(',')[0]} processes, or none: equivcheck starts ranks by itself",
        )
    if settings["jobs"] > 1:
        raise UsageError(
            f"{OPTIONS['jobs'].flag} {settings['jobs']} in a group of {size} processes",
            where=f"{settings.origins['jobs']}; {told}",
            expected=f"{OPTIONS['jobs'].flag} 1",
            because="every case needs all ranks of the group",
        )
    return Settings(
        {**settings.values, "world_size": (size,)}, {**settings.origins, "world_size": "WORLD_SIZE"}
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


# A process that ended once may have been killed from outside; one that ended twice in the same case was ended by it.
_STARTS = 2


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
        self._order: dict[str, int] = {}
        self._ran = self._planned = 0
        self._seconds = self._saved = self._cost = 0.0
        self._journal = Journal(
            outputs.result_path,
            [*map(str, options.targets), settings["train"] or ""],
            {name: settings[name] for name in ("train", "seed", "rng", "device")},
        )

    def cases_of(self, match: selection.Match | None) -> EquivcheckError | None:
        """Run what is selected; return the usage error that ended it, if one did."""
        settings = self._settings
        try:
            require_device(settings["device"])
            if not self._options.quiet and not self._options.ended:
                say(self._out, text.header(results.environment(), settings["seed"]))
            if max(settings["world_size"]) > 1 and settings["jobs"] == 1:
                start_server()  # It loads torch while this process does.
            planned, self._notes = plan(
                self._options.targets,
                settings.values,
                explicit=settings.stated("accumulation_steps"),
                stated=settings.stated,
            )
            jobs = [job for job in planned if selection.selected(job.case, match)]
            if planned and not jobs:
                known = [job.case for job in planned]
                self._notes.append(selection.unmatched(known, self._options.select))
            self._planned = len(jobs)
            self._run(selection.shard_of(jobs, self._options.shard))
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
        whole = results.assemble(
            sorted(self._cases, key=lambda case: self._order[case["id"]]),
            target=" ".join(map(str, self._options.targets)),
            notes=self._notes,
            interrupted=self._interrupted,
        )
        whole["shard"] = self._options.shard
        if self._options.shard or self._interrupted:
            whole["planned"] = self._planned
        if self._options.shard:
            whole["run"] = self._journal.run
        whole["counts"] = matrix.counts(self._cases)
        whole["matrix"] = matrix.table(whole["cases"])
        return whole

    def tell(self, result: Mapping[str, Any]) -> None:
        """Print the blocks of what failed, the notes and the summary."""
        if self._options.verbose:
            blocks = [text.block(case, self._paint) for case in result["cases"]]
        else:
            blocks = text.blocks(filter(words.failed, result["cases"]), self._paint)
        for block in blocks:
            say(self._out, "\n" + block)
        if shown := matrix.render(result, self._paint):
            say(self._out, shown)
        for remark in text.remarks(result):
            say(self._out, remark)
        say(self._out, "\n" + text.summary(result))
        if shown and self._ran:
            rate = f"{self._ran / self._seconds:.2g} cases per second, -j {self._settings['jobs']}"
            ran = f"{self._ran} case{'s' if self._ran > 1 else ''} ran"
            say(self._out, f"{ran} in {self._seconds:.1f} s by the clock: {rate}")
            say(self._out, "(the seconds above are those of the cases, added up)")

    def _run(self, jobs: list[Job]) -> None:
        self._order = {job.case.id: position for position, job in enumerate(jobs)}
        died = self._options.ended
        goes_on = self._options.resume or bool(died)
        done = self._journal.resume() if goes_on else {}
        if not goes_on:
            self._journal.begin()
        self._cases += [done[identity] for identity in self._order if identity in done]
        left = [job for job in jobs if job.case.id not in done]
        if died:
            case = self._journal.ended()
            during = f" during case {case['id']}, {case['label']}" if case else ""
            say(self._out, f"note: the process ended with {died}{during}; the run goes on")
        elif self._options.resume:
            self._notes.append(
                f"resumed: {len(self._cases)} {'case was' if len(self._cases) == 1 else 'cases were'} finished before"
                if done
                else "resumed: nothing was finished before, so that all cases run"
            )
            if ended := self._journal.ended():
                # Now, since what ended the process before may end this one, too.
                told = f"the run before ended during case {ended['id']}, {ended['label']}"
                say(self._out, f"note: {told}")
        progress = Progress(len(jobs), len(self._cases), quiet=self._options.quiet)
        began = time.monotonic()
        with progress.shown(), closing(self._finished(left, progress)) as finished:
            for case in finished:
                self._ran += 1
                self._seconds = time.monotonic() - began
                self._cases.append(case)
                if self._journal.append(case):
                    case_finished()
                progress.end(failed=words.failed(case))
                with progress.paused():
                    self._line(case)
                self._save()
                if self._options.stop and words.failed(case):
                    self._notes.append("stopped at the first failure (-x)")
                    break

    def _finished(self, jobs: list[Job], progress: Progress) -> Generator[dict[str, Any]]:
        """Run the jobs, in this process or side by side, and yield the cases as they finish."""
        timeout = self._settings["timeout"]
        # Command lines are run in processes of their own already.
        named = all(isinstance(target, str) for target in self._options.targets)
        if self._settings["jobs"] > 1 and len(jobs) > 1 and named:
            yield from side_by_side(
                jobs,
                self._settings["jobs"],
                timeout=timeout,
                begun=lambda job: progress.begin(job.case.label),
            )
            return
        from equivcheck.ranks.team import kept  # noqa: PLC0415 - torch is loaded only to run

        with kept():
            for job in jobs:
                progress.begin(job.case.label)
                before = self._journal.ended()
                if before.get("id") == job.case.id and before.get("starts", 0) >= _STARTS:
                    self._journal.settle()
                    yield process_ended(job, before["starts"], self._options.ended)
                    continue
                with (
                    self._journal.running(job.case.id, job.case.label),
                    one_thread() if job.theory is not None else nullcontext(),
                ):
                    cases = list(outcomes([job], timeout=timeout, progress=progress))
                yield from cases

    def _save(self) -> None:
        """Write the result so far, but spend no more than a small part of the run on it.

        Each writing costs as much as there are cases; what it leaves out is in the journal.
        """
        began = time.monotonic()
        if began - self._saved < 50 * self._cost:
            return
        self._outputs.save(self.result())
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def _line(self, case: Mapping[str, Any]) -> None:
        is_quiet = self._options.quiet or (case["workload"] and not self._options.verbose)
        if is_quiet and not words.failed(case):
            return  # What a suite finds is shown as a matrix.
        if case["target"] != self._shown_target:
            self._shown_target = case["target"]
            say(self._out, f"\n{text.printable(case['target'])}")
        say(self._out, text.line(case, self._paint))
