"""Print the cases that `run` would run, with their ids; runs none of them."""

from __future__ import annotations

import argparse

from equivcheck.api import plan
from equivcheck.cli import selection
from equivcheck.cli.parser import add_options, flags
from equivcheck.cli.run import refuse_targets
from equivcheck.cli.screen import own_stdout, say
from equivcheck.config import resolve

HELP = "print the cases that would run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `list`."""
    parser.add_argument("targets", metavar="TARGET", nargs="*", default=[])
    add_options(
        parser,
        *("accumulation_steps", "split", "world_size", "strategy", "device", "precision"),
        *("train", "optimizer_steps", "rng", "seed"),
    )
    parser.add_argument("-k", metavar="EXPR", dest="select", help="only cases that match")


def execute(options: argparse.Namespace) -> int:
    """Print one line per case; 5 if there is none."""
    settings = resolve(flags(options))
    refuse_targets(options.targets)
    match = selection.compiled(options.select)
    with own_stdout() as out:
        jobs, notes = plan(
            options.targets,
            settings.values,
            explicit=settings.stated("accumulation_steps"),
            stated=settings.stated,
        )
        cases = [job.case for job in jobs if selection.selected(job.case, match)]
        for case in cases:
            say(out, f"{case.id}  {case.target}  {case.label}")
        if jobs and not cases:
            notes.append(selection.unmatched([job.case for job in jobs], options.select))
        for note in notes:
            say(out, f"note  {note}")
    return 0 if cases else 5
