"""Finished cases as they come, a line each beside the result: what a killed run has done is not lost, nor done twice.

A case is one write to a file opened for appending. Of a line that was cut off by the end of the process, or of the
machine, nothing is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from equivcheck import result as results
from equivcheck.errors import UsageError

SCHEMA = "equivcheck.journal/1"


class Journal:
    """The cases that a run has finished.

    Args:
        path: The result's own path, beside which the journal lies; None keeps none.
        targets: What runs; its files are remembered, since cases of other code are other cases.
        settings: What applies to all cases and is not part of one, as `timeout` is not.
    """

    def __init__(
        self, path: Path | None, targets: Iterable[str], settings: Mapping[str, Any]
    ) -> None:
        self.path = None if path is None else path.with_name(f"{path.stem}.jsonl")
        facts = results.environment()
        # What makes cases those of one run; the result keeps it too, for `merge`.
        self.run: dict[str, Any] = {
            "versions": {name: facts[name] for name in ("equivcheck", "torch", "numpy", "python")},
            "code": _digests(targets),
            "settings": results.finite(settings),
        }
        self._header = {"schema": SCHEMA, **self.run}

    def begin(self) -> None:
        """Start anew: what an earlier run has left is gone."""
        if self.path is not None:
            results.write_text(self.path, json.dumps(self._header) + "\n")
            self.settle()

    def resume(self) -> dict[str, dict[str, Any]]:
        """Return the cases that are finished, by id, and make the journal ready for more.

        Without a journal nothing is finished: a workflow may resume whatever there is, its first run included.

        Raises:
            UsageError: It was a run of other code or settings.
        """
        lines = list(_whole_lines(self.path)) if self.path and self.path.exists() else []
        if not lines:
            self.begin()
            return {}
        assert self.path is not None
        header = lines[0]
        for name, value in self._header.items():
            if header.get(name) != value:
                raise UsageError(
                    f"other-run: {self.path} is of a run with other {name}",
                    expected=_told(value),
                    because=f"it has {_told(header.get(name))}: its cases are not those of this run",
                    fix="the same command without --resume",
                )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        results.write_text(self.path, text)  # without the line that was cut off
        return {str(case["id"]): case for case in lines[1:]}

    def append(self, case: Mapping[str, Any]) -> bool:
        """Write down a finished case at once, and return whether it is on disk."""
        if self.path is None:
            return False
        line = json.dumps(results.finite(case), ensure_ascii=False, allow_nan=False) + "\n"
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
                os.fsync(file)
            finally:
                os.close(file)
        except OSError:  # A full disk costs `--resume`; the result itself says what it costs.
            return False
        return True

    @contextmanager
    def running(self, case: str, label: str) -> Iterator[None]:
        """Keep on disk which case runs in this process: code that ends Python is known by what it leaves there."""
        if self.path is None:
            yield
            return
        before = self.ended()
        starts = before.get("starts", 0) + 1 if before.get("id") == case else 1
        told = json.dumps({"id": case, "label": label, "starts": starts})
        with suppress(OSError):
            results.write_text(self._running, told)
        try:
            yield
        finally:
            self.settle()

    def settle(self) -> None:
        """Say that no case runs in this process."""
        if self.path is not None:
            self._running.unlink(missing_ok=True)

    def ended(self) -> dict[str, Any]:
        """Return the case during which an earlier process ended, and how often it was begun; empty if none did."""
        if self.path is None:
            return {}
        try:
            found = json.loads(self._running.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def _running(self) -> Path:
        assert self.path is not None
        return self.path.with_suffix(".running")


def _whole_lines(path: Path) -> Iterable[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        try:
            found = json.loads(line)
        except ValueError:
            return
        if isinstance(found, dict):
            yield found


def _digests(targets: Iterable[str]) -> dict[str, str]:
    """Return a digest of each file that is named on the command line."""
    found = {}
    for target in targets:
        path = Path(target.partition(":")[0])
        try:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        except (
            OSError
        ):  # a suite, a module, or a command line, which may be longer than a path can be
            continue
    return found


def _told(value: Any) -> str:
    return (
        ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    )
