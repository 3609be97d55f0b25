"""Render a saved result: text by default, or any of the files. Needs no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from equivcheck import result as results
from equivcheck.cli.outputs import open_page, refuse_shared, refuse_unwritable
from equivcheck.cli.screen import colored
from equivcheck.config import OPTIONS
from equivcheck.errors import UsageError
from equivcheck.report import github, html, junit, markdown, slides, text

HELP = "render a saved result"
LATEST = "reports/latest/report.html"
_RENDERERS = {
    "html": html.render,
    "json": results.to_json,
    "junit": junit.render,
    "markdown": markdown.render,
    "github": github.render,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("result", metavar="RESULT", help="a file written by run --json")
    for name in _RENDERERS:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"write {name}; - for stdout")
    parser.add_argument(
        "--svg", metavar="FOLDER", help="write the plots of failing cases as SVG files"
    )
    parser.add_argument(
        "--open", action="store_true", help=f"show the page in a browser (--html, or {LATEST})"
    )
    parser.add_argument("--color", metavar="WHEN", default="auto", help=OPTIONS["color"].help)


def execute(options: argparse.Namespace) -> int:
    """Render and return 0: the finding was the run's, not the report's."""
    try:
        color = OPTIONS["color"].parse(options.color)
    except ValueError as error:
        raise UsageError(f"--color is {options.color!r}", expected=str(error)) from None
    if options.open and options.html == "-":
        raise UsageError(
            "--open with --html - has no file to open",
            expected="a path after --html",
            fix=f"--html {LATEST} --open",
        )
    refuse_shared({f"--{name}": getattr(options, name) for name in _RENDERERS})
    result = results.load(options.result)
    if options.open and not options.html:
        options.html = LATEST
    wanted = {name: getattr(options, name) for name in _RENDERERS if getattr(options, name)}
    for name, path in wanted.items():
        rendered = _RENDERERS[name](result)
        if path == "-":
            sys.stdout.write(rendered)
            continue
        write(f"--{name}", path, rendered)
    if options.svg:
        for name, drawn in slides.render(result).items():
            write("--svg", str(Path(options.svg) / name), drawn)
    if options.open:
        open_page(options.html)
    if not wanted and not options.svg:
        print(text.render(result, text.ansi if colored(color, sys.stdout) else text.plain))
    return 0


def write(flag: str, path: str, rendered: str) -> None:
    """Write one file.

    Raises:
        UsageError: It cannot be written, with the reason that the system gives.
    """
    refuse_unwritable(flag, path)
    try:
        results.write_text(path, rendered)
    except OSError as error:
        raise UsageError(f"cannot write {flag} {path}: {error.strerror}") from None
