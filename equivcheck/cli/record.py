"""Run a command as it is, and write down what its optimizer steps do.

The command keeps its output and its exit code. What is written can be compared
with another recording, made on another machine or by other versions:

  equivcheck record -o full -- python train.py --batch-size 16
  equivcheck record -o accumulated -- python train.py --batch-size 4 --accum 4
  equivcheck compare full accumulated
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

from equivcheck.attach.launch import launch, words_of
from equivcheck.attach.spec import Spec
from equivcheck.cli.parser import add_options, flags
from equivcheck.config import resolve
from equivcheck.errors import UsageError

HELP = "watch a script and write a recording"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `record`."""
    parser.add_argument("-o", "--output", metavar="FOLDER", default="recording", help="where to")
    parser.add_argument(
        "--float64", action="store_true", help="compute in float64, without dropout"
    )
    add_options(parser, "optimizer_steps", "timeout")
    parser.add_argument("words", metavar="CMD", nargs="+", help="the command, after --")


def execute(options: argparse.Namespace) -> int:
    """Run the command and return its own exit code."""
    settings = resolve(flags(options))
    target = Path(options.output)
    if target.exists() and (not target.is_dir() or not _is_ours(target)):
        raise UsageError(
            f"output-exists: {target} is there already and is no recording",
            expected="a new folder, or one that equivcheck record wrote",
            fix="-o another-folder",
        )
    words, variables = words_of(_quoted(options.words))
    shutil.rmtree(target, ignore_errors=True)
    spec = Spec(
        "recorded",
        str(target.resolve()),
        "watch",
        promoted=options.float64,
        neutral=options.float64,
        ends=False,
        optimizer_steps=settings["optimizer_steps"],
        launched=_quoted(options.words),
    )
    try:
        ended = launch(
            words,
            spec,
            target.resolve(),
            variables=variables,
            inherit=True,
            timeout=settings["timeout"],
        )
    except TimeoutError:
        print(f"timed-out: the command was ended after {settings['timeout']:g} s", file=sys.stderr)
        return 3
    for failure in ended.failures:
        print(f"not watched: {failure.strip().splitlines()[-1]}", file=sys.stderr)
    ranks = sorted(target.glob("rank-*"))
    if not ranks:
        print("nothing recorded: no forward of a model that is trained was seen", file=sys.stderr)
    else:
        steps, size = _seen(ranks[0])
        print(
            f"recorded {steps} optimizer steps of {size} rank{'s' * (size > 1)} in {target}",
            file=sys.stderr,
        )
    return ended.code if ended.code >= 0 else 128 - ended.code


def _is_ours(folder: Path) -> bool:
    return not any(folder.iterdir()) or (folder / "spec.json").exists()


def _seen(rank: Path) -> tuple[int, int]:
    """Return the optimizer steps of a rank and the world size; torch, which takes a second to load, is not needed."""
    path = rank / "recording.json"
    if not path.exists():
        return 0, 1  # ended before it had anything to write
    whole = json.loads(path.read_text(encoding="utf-8"))
    body = json.loads(whole["body"])
    return len(body["recording"]["steps"]), int(body["facts"]["world_size"])


def _quoted(words: list[str]) -> str:
    return shlex.join(words)
