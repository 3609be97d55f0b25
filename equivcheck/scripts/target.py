"""A script as the code under test: two command lines, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equivcheck.attach.launch import words_of
from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.scripts.experiment import ScriptExperiment

__all__ = ["Command", "Script", "interpreters"]


@dataclass(frozen=True)
class Command:
    """One command line, split.

    Attributes:
        text: As the user typed it.
        words: Program and arguments.
        variables: Set in front of it.
    """

    text: str
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, interpreter: str | None = None) -> Command:
        """Return a command line, run by another interpreter or in another environment if one is named.

        Raises:
            UsageError: It is empty, has an open quote, or its program is not found.
        """
        words, variables = words_of(text)
        if interpreter is not None:
            words, variables = _moved(words, variables, interpreter)
        return cls(text, tuple(words), tuple(variables.items()))


def _moved(
    words: list[str], variables: dict[str, str], interpreter: str
) -> tuple[list[str], dict[str, str]]:
    """Return a command line with its program taken from another environment."""
    python = Path(interpreter)
    if python.is_dir():
        python = python / "bin" / "python"
    if not python.exists():
        raise UsageError(
            f"no-such-interpreter: {interpreter}",
            expected="an interpreter, or the folder of an environment",
            fix="--versions .venv-a/bin/python,.venv-b/bin/python",
        )
    name = Path(words[0]).name
    beside = python.parent / name
    program = python if name.startswith("python") else beside
    if not program.exists():
        raise UsageError(f"no-such-program: {name} is not in {python.parent}", where=interpreter)
    path = os.pathsep.join([str(python.parent), variables.get("PATH", os.environ.get("PATH", ""))])
    return [str(program), *words[1:]], {**variables, "PATH": path}


@dataclass(frozen=True)
class Script:
    """The two command lines.

    Attributes:
        full: Runs the full batch in one forward and backward per optimizer step.
        accumulated: Runs the same samples in micro-batches.
        optimizer_steps: As many are looked at.
        versions: Interpreters, where the same command runs under two of them.
    """

    full: Command
    accumulated: Command
    optimizer_steps: int = 8
    versions: tuple[str, ...] = ()
    repeatable: bool = field(default=True, init=False)

    @property
    def target(self) -> str:
        """What a result calls it: both command lines, or one and its two interpreters."""
        if self.versions:
            return f"{self.full.text} [{' | '.join(self.versions)}]"
        return f"{self.full.text} | {self.accumulated.text}"

    @property
    def location(self) -> str:
        """The accumulated command line."""
        return self.accumulated.text

    def experiment(
        self,
        _script: Any,
        case: Case,
        progress: Callable[[str], None],
        *,
        promoted: bool = True,
    ) -> ScriptExperiment:
        """Return the experiment that decides the case."""
        return ScriptExperiment(self, case, progress, promoted=promoted)


def interpreters(value: str) -> tuple[str, str]:
    """Return the two interpreters of `--versions`.

    Raises:
        UsageError: There are not two.
    """
    found = [each.strip() for each in value.split(",") if each.strip()]
    if len(found) != 2:
        raise UsageError(
            f"--versions names {len(found)} interpreters",
            expected="two, with a comma between them",
            fix="--versions .venv-a/bin/python,.venv-b/bin/python",
        )
    return found[0], found[1]
