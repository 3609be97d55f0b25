"""Render a saved result: text by default, or any of the files. Needs no torch."""

from __future__ import annotations

import argparse
import sys

from equivcheck import result as results
from equivcheck.cli.outputs import refuse_unwritable
from equivcheck.cli.screen import colored
from equivcheck.config import OPTIONS
from equivcheck.errors import UsageError
from equivcheck.report import html, junit, markdown, text

HELP = "render a saved result"
_RENDERERS = {
    "html": html.render,
    "json": results.to_json,
    "junit": junit.render,
    "markdown": markdown.render,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("result", metavar="RESULT", help="a file written by run --json")
    for name in _RENDERERS:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"write {name}; - for stdout")
    parser.add_argument("--color", metavar="WHEN", default="auto", help=OPTIONS["color"].help)


def execute(options: argparse.Namespace) -> int:
    """Render and return 0: the finding was the run's, not the report's."""
    try:
        color = OPTIONS["color"].parse(options.color)
    except ValueError as error:
        raise UsageError(f"--color is {options.color!r}", expected=str(error)) from None
    result = results.load(options.result)
    wanted = {name: getattr(options, name) for name in _RENDERERS if getattr(options, name)}
    for name, path in wanted.items():
        rendered = _RENDERERS[name](result)
        if path == "-":
            sys.stdout.write(rendered)
            continue
        refuse_unwritable(f"--{name}", path)
        try:
            results.write_text(path, rendered)
        except OSError as error:
            raise UsageError(f"cannot write --{name} {path}: {error.strerror}") from None
    if not wanted:
        print(text.render(result, text.ansi if colored(color, sys.stdout) else text.plain))
    return 0
