"""The command line: one module per command, and one place that turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

from equivcheck.cli import guard
from equivcheck.cli.parser import parse
from equivcheck.cli.screen import error_block
from equivcheck.errors import EquivcheckError
from equivcheck.result import INTERRUPTED, write_text
from equivcheck.usercode import warnings_in_place

LATEST = Path("reports/latest")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; never lets an exception out.

    Args:
        arguments: None for those of the command line, which then runs in a child where it runs the user's code.
    """
    if arguments is not None:
        return _command(arguments)
    given = sys.argv[1:]
    if not guard.guards(given):
        return _command(given)
    try:
        return guard.guarded(lambda ended: _command(given, ended), goes_on=given[0] == "run")
    except EquivcheckError as error:
        error_block(error)
        return error.exit_code


def _command(arguments: list[str], ended: str = "") -> int:
    """Run one command; `ended` says how the process that ran it before ended."""
    try:
        options = parse(arguments)
        options.ended = ended
        with warnings_in_place():
            code: int = options.execute(options)
        sys.stdout.flush()
    except SystemExit as stop:  # argparse after --help and --version
        return stop.code if isinstance(stop.code, int) else 0
    except EquivcheckError as error:
        error_block(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left, as in `equivcheck explain | head -1`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the last line of defence
        return _internal(error)
    return code


def _internal(error: Exception) -> int:
    """Report a fault of our own in a few lines; the traceback goes to a file."""
    report = "".join(traceback.format_exception(error))
    for folder in (LATEST, Path(tempfile.gettempdir())):
        path = folder / "equivcheck-crash.txt"
        try:
            write_text(path, report)
        except OSError:
            continue
        where = str(path)
        break
    else:
        where = report
    print(
        f"internal error: {type(error).__name__}: {error}\n"
        f"  where     {where}\n"
        "  because   this is a fault of equivcheck, not of your code\n"
        "  fix       report it with that file and the output of equivcheck doctor",
        file=sys.stderr,
    )
    return 70
