"""Say what changed between two results: fixed, broken, new and gone cases. Needs no torch."""

from __future__ import annotations

import argparse
import sys

from equivcheck import result as results
from equivcheck.cli.outputs import open_page, refuse_shared
from equivcheck.cli.report import write
from equivcheck.errors import UsageError
from equivcheck.report import changes, text, words

HELP = "compare two saved results"
LATEST = "reports/latest/diff.html"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diff`."""
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--html", metavar="PATH", help="write the changes as a page; - for stdout")
    parser.add_argument("--markdown", metavar="PATH", help="write them as a table; - for stdout")
    parser.add_argument(
        "--open", action="store_true", help=f"show the page in a browser (--html, or {LATEST})"
    )


def execute(options: argparse.Namespace) -> int:
    """Print one line per change; 1 if anything passes no longer, else 0."""
    if options.open and options.html == "-":
        raise UsageError("--open with --html - has no file to open", fix=f"--html {LATEST} --open")
    refuse_shared({"--html": options.html, "--markdown": options.markdown})
    old, new = results.load(options.old), results.load(options.new)
    found = changes.changes(old, new)
    shown = [each for each in found if each["what"] != "same"]
    if options.open and not options.html:
        options.html = LATEST
    if options.html:
        page = changes.page(old, new, (options.old, options.new))
        _out("--html", options.html, page)
    if options.markdown:
        _out("--markdown", options.markdown, changes.markdown(old, new))
    if "-" not in (options.html, options.markdown):
        for each in shown:
            place = text.printable(f"{each['case'].get('target', '')}  {words.label(each['case'])}")
            print(f"{each['what']:<9} {each['id']}  {place}")
            print(
                f"  was     {changes.told(each['before'])}\n  now     {changes.told(each['after'])}"
            )
        print(f"{len(shown)} changed, {len(found) - len(shown)} same")
    if options.open:
        open_page(options.html)
    return 1 if any(each["what"] == "broken" for each in shown) else 0


def _out(flag: str, path: str, rendered: str) -> None:
    if path == "-":
        sys.stdout.write(rendered)
    else:
        write(flag, path, rendered)
