"""The argument parser: flags made from the table of options, mistakes answered with a guess."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from typing import Any, NoReturn

from equivcheck.config import OPTIONS, closest
from equivcheck.errors import UsageError
from equivcheck.result import environment

COMMANDS = (
    "run",
    "search",
    "record",
    "compare",
    "list",
    "replay",
    "report",
    "diff",
    "merge",
    "explain",
    "doctor",
    "init",
)

DESCRIPTION = """\
Proves whether accumulating micro-batches gives the update that the full batch
gives, for your own training loop, and names the fault if it does not."""

EPILOG = """\
exit codes:
  0    equivalent, or expected
  1    divergent, precision-loss, or an expected cause is missing
  2    wrong usage or configuration, or a target that does not load
  3    your code raised, a rank died, or time ran out
  4    inconclusive or invalid
  5    nothing selected
  70   a fault of equivcheck
  130  interrupted; the partial result is written"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are usage errors like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise a usage error that names the help to read."""
        raise UsageError(message, fix=f"{self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"equivcheck {environment()['equivcheck']}")  # parser.exit would write to stderr
        parser.exit()


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the parsed command line, with `execute` set to the command's function.

    Raises:
        UsageError: An unknown command or flag (with the closest one), or a missing argument.
    """
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and arguments[0] == first and first not in COMMANDS:
        guess = closest(first, COMMANDS)
        raise UsageError(
            f"unknown command {first!r}",
            expected="one of " + ", ".join(COMMANDS),
            fix=f"equivcheck {guess}" if guess else f"equivcheck run {first}",
        )
    # The command named first is the only one that is needed: the others' modules are not even imported.
    parser, commands = build(COMMANDS if first is None or arguments[0] != first else (first,))
    options, extra = parser.parse_known_args(arguments)
    if not hasattr(options, "execute"):
        parser.print_help()
        raise SystemExit(2)
    unknown = [word for word in extra if word.startswith("-")]
    if unknown or (extra and not hasattr(options, "targets")):
        word = (unknown or extra)[0].split("=")[0]
        known = commands[options.command]._option_string_actions  # noqa: SLF001 - no public way
        guess = closest(word, known)
        fix = f"did you mean {guess}?" if guess else f"equivcheck {options.command} --help"
        # What renders a result can be had of every result, though not of every command.
        if word in build(("report",))[1]["report"]._option_string_actions:  # noqa: SLF001 - as above
            fix = f"equivcheck report RESULT {word} PATH"
        raise UsageError(
            f"unknown argument {word} of equivcheck {options.command}",
            fix=fix,
        )
    if extra:  # argparse takes positionals from one place only; ours may stand between flags
        options.targets += extra
    return options


def build(names: Sequence[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """Return the parser and those of the commands named, by name."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="equivcheck",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=layout,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    group = parser.add_subparsers(metavar="COMMAND", dest="command", parser_class=Parser)
    commands = {}
    for name in names:
        module = importlib.import_module(f"equivcheck.cli.{name}")
        command = group.add_parser(
            name,
            help=module.HELP,
            description=(module.__doc__ or "").strip(),
            formatter_class=layout,
            allow_abbrev=False,
        )
        module.configure(command)
        command.set_defaults(execute=module.execute)
        commands[name] = command
    return parser, commands


def add_options(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add flags from the table of options; their values are checked when all sources are known."""
    for name in names:
        option = OPTIONS[name]
        text = option.help
        if option.default not in (None, ()):
            default = option.default
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            text += f" (default {shown})"
        action = "append" if name == "expect" else "store"
        short = ("-j",) if name == "jobs" else ()
        parser.add_argument(*short, option.flag, metavar=option.metavar, help=text, action=action)


def flags(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the table that this command line has, None where not given."""
    given = {name: getattr(options, name, None) for name in OPTIONS}
    if given["expect"]:
        given["expect"] = ",".join(given["expect"])
    return given
