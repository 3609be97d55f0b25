"""Compare two recordings: of the full batch, and of the accumulated run.

Nothing is run. What differs is measured at a fixed sample of coordinates;
causes are suspected, and proved only by equivcheck run.
"""

from __future__ import annotations

import argparse
import sys

from equivcheck import result as results
from equivcheck.cli.outputs import Outputs
from equivcheck.cli.parser import add_options, flags
from equivcheck.cli.screen import colored, own_stdout, say
from equivcheck.config import resolve
from equivcheck.report import text, words

HELP = "compare two recordings"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.add_argument("full", metavar="FULL", help="recording of the full batch")
    parser.add_argument("accumulated", metavar="ACCUMULATED", help="recording of the other run")
    parser.add_argument(
        "--control", metavar="FOLDER", help="a second recording of the full batch: its noise"
    )
    add_options(parser, "expect", "json", "html", "junit", "github", "color")
    parser.add_argument("-q", action="store_true", dest="quiet", help="failures and summary only")
    parser.add_argument("-v", action="store_true", dest="verbose", help="a block in any case")


def execute(options: argparse.Namespace) -> int:
    """Compare, print and return the exit code."""
    settings = resolve(flags(options))
    outputs = Outputs(settings, latest=False)
    with own_stdout() as stdout:
        from equivcheck.scripts.recorded import compare_recordings  # noqa: PLC0415 - loads torch

        case = results.finite(
            compare_recordings(
                options.full, options.accumulated, options.control, expect=settings["expect"]
            )
        )
        result = results.assemble([case], target=case["target"])
        out = sys.stderr if outputs.json_on_stdout else stdout
        paint = text.ansi if colored(settings["color"], out) else text.plain
        if not options.quiet or words.failed(case):
            say(out, text.line(case, paint))
        if words.failed(case) or options.verbose:
            say(out, "\n" + text.block(case, paint))
        else:
            for note in case["notes"]:
                say(out, f"note: {note}")
        say(out, "\n" + text.summary(result))
        outputs.finish(result, stdout)
    return int(result["exit_code"])
