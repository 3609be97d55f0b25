"""Where results go: checked before the first run, written atomically after every finished case."""

from __future__ import annotations

import sys
import tempfile
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from equivcheck import result as results
from equivcheck.config import Settings
from equivcheck.errors import UsageError
from equivcheck.report import github, html, junit

LATEST = Path("reports/latest")


def refuse_unwritable(flag: str, path: str) -> None:
    """Refuse a path that cannot be written, before minutes are spent on a result for it.

    Raises:
        UsageError: With the reason that the system gives.
    """
    target = Path(path)
    try:
        if target.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        if target.exists():
            with target.open("a"):
                pass
        if not target.exists() or target.is_file():  # a device has no neighbours to be drafted in
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise UsageError(
            f"cannot write {flag} {path}: {error.strerror}", fix="name a file that can be written"
        ) from None


def refuse_shared(paths: Mapping[str, str | None]) -> None:
    """Refuse two renderings in one file, of which the second would replace the first, or both on stdout.

    Args:
        paths: Path by the flag, or other place, that names it.

    Raises:
        UsageError: Naming both.
    """
    taken: dict[str, str] = {}
    for flag, path in paths.items():
        if path is None or (path != "-" and Path(path).exists() and not Path(path).is_file()):
            continue  # a device, as /dev/null, takes any number
        other = taken.setdefault("-" if path == "-" else str(Path(path).resolve()), flag)
        if other != flag:
            both = "both are for stdout" if path == "-" else f"both name {path}"
            raise UsageError(
                f"{other} and {flag}: {both}",
                expected="a file of its own for each",
                because="the second would replace the first"
                if path != "-"
                else "what reads it would find neither",
                fix=f"another path after {flag}",
            )


def open_page(path: str) -> None:
    """Show a page in the user's browser; where there is none, say where the page is."""
    page = Path(path).resolve()
    try:
        shown = webbrowser.open(page.as_uri())
    except (OSError, webbrowser.Error):
        shown = False
    if not shown:
        print(f"note: no browser to open; the page is {page}", file=sys.stderr)


class Outputs:
    """Everything that a run writes besides its text."""

    def __init__(self, settings: Settings, *, latest: bool = True) -> None:
        self._settings = settings
        self._failures: dict[str, UsageError] = {}
        refuse_shared(
            {settings.origins[n]: settings[n] for n in ("json", "html", "junit") if settings[n]}
        )
        self._latest = latest and self._prepared()
        for name in ("json", "html", "junit"):
            if settings[name] not in (None, "-"):
                refuse_unwritable(settings.origins[name], settings[name])

    @property
    def json_on_stdout(self) -> bool:
        """Whether stdout belongs to the result JSON."""
        return bool(self._settings["json"] == "-")

    @property
    def result_path(self) -> Path | None:
        """Where the result JSON goes, the default place if it is not named; None if nowhere."""
        if self._settings["json"] not in (None, "-"):
            return Path(self._settings["json"])
        return LATEST / "result.json" if self._latest else None

    def save(self, result: Mapping[str, Any]) -> None:
        """Write the result so far, so that nothing finished is lost to what comes next."""
        self._save(results.to_json(result))

    def _save(self, text: str) -> None:
        if self._latest:
            self._try(LATEST / "result.json", text)
        if self._settings["json"] not in (None, "-"):
            self._try(self._settings["json"], text)

    def finish(self, result: Mapping[str, Any], out: TextIO) -> None:
        """Write every rendering asked for.

        Raises:
            UsageError: A file could not be written; raised last, when all else is out.
        """
        text = results.to_json(result)
        self._save(text)
        if self.json_on_stdout:
            out.write(text)
            out.flush()
        for name, renderer in (("html", html.render), ("junit", junit.render)):
            if self._settings[name]:
                self._try(self._settings[name], renderer(result))
        self._annotate(result, out)
        for failure in self._failures.values():
            raise failure

    def _prepared(self) -> bool:
        """Make the default folder; a read-only place costs `replay`, not the run."""
        try:
            refuse_unwritable("the result", str(LATEST / "result.json"))
            ignore = LATEST / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="utf-8")
        except (UsageError, OSError) as error:
            print(f"note: {str(error).splitlines()[0]}; replay needs it", file=sys.stderr)
            return False
        return True

    def _try(self, path: str | Path, text: str) -> None:
        try:
            results.write_text(path, text)
        except OSError as error:
            self._failures[str(path)] = UsageError(
                f"cannot write {path}: {error.strerror}",
                because="the run is over and its result is printed above",
            )
        else:
            self._failures.pop(str(path), None)

    def _annotate(self, result: Mapping[str, Any], out: TextIO) -> None:
        if not github.is_wanted(self._settings["github"]):
            return
        stream = sys.stderr if self.json_on_stdout else out  # workflows read commands in both
        for command in github.commands(result):
            print(command, file=stream, flush=True)
        try:
            github.append_summary(result)
        except OSError as error:
            print(f"note: no step summary: {error.strerror}", file=sys.stderr)
