"""A script as the code under test: two command lines, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equivcheck.attach.launch import words_of
from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.scripts.experiment import ScriptExperiment

__all__ = ["Command", "Script", "interpreters", "script_of", "scripts_of"]


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
    def trained_nothing(self) -> tuple[str, str]:
        """Why no backward may have been seen, and what to do then."""
        because = (
            "the command ended before it trained, as one does that finds its own finished checkpoint; "
            "or it trains with another library than torch"
        )
        return (
            because,
            'let every run start anew: sh -c "rm -rf out; python train.py --out out"',
        )

    def __str__(self) -> str:
        return self.target

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


def scripts_of(
    full: str | None,
    accumulated: Sequence[str],
    versions: str | None,
    optimizer_steps: int,
) -> list[Script]:
    """Return what `--full`, `--accumulated` and `--versions` ask for: one script for each accumulated command.

    Raises:
        UsageError: One of the two is missing, or a command cannot be run.
    """
    if full is None:
        raise UsageError(
            "no-full-command: --full is missing",
            expected="the command line that trains on the full batch at once",
            fix='--full "python train.py --batch-size 16 --accum 1"',
        )
    if versions is not None:
        if accumulated:
            raise UsageError(
                "versions-and-accumulated: --versions runs one command in two environments",
                expected="--full and --versions, or --full and --accumulated",
                fix="run the two questions one after the other",
            )
        pair = interpreters(versions)
        first, second = (Command.parse(full, each) for each in pair)
        return [Script(first, second, optimizer_steps, pair)]
    if not accumulated:
        raise UsageError(
            "no-accumulated-command: --accumulated is missing",
            expected="the command line that trains on the same samples in micro-batches",
            fix='--accumulated "python train.py --batch-size 4 --accum 4"',
        )
    one = Command.parse(full)
    return [Script(one, Command.parse(each), optimizer_steps) for each in accumulated]


def script_of(case: Mapping[str, Any]) -> Script | None:
    """Return the script of a case of a saved result; None if the case is another kind of subject's."""
    if "full_command" not in case:
        return None
    versions = case.get("versions") or []
    [found] = scripts_of(
        case["full_command"],
        [] if versions else [case["accumulated_command"]],
        ",".join(versions) or None,
        int(case["optimizer_steps"]),
    )
    return found


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
