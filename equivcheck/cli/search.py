"""Look for the smallest case in which a training loop fails, and write it as a script.

Drives TARGET over cuts, tails, ranks and rows of its own batches. The first
case that diverges is shrunk: one optimizer step, few rows, a small K.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equivcheck import result as results
from equivcheck.api import DEFAULT_ACCUMULATION_STEPS, require_device
from equivcheck.case import Case
from equivcheck.cli.outputs import Outputs, refuse_unwritable
from equivcheck.cli.parser import add_options, flags
from equivcheck.cli.run import refuse_targets
from equivcheck.cli.screen import Progress, colored, own_stdout, say
from equivcheck.config import Settings, resolve
from equivcheck.errors import UsageError
from equivcheck.report import text, words

HELP = "look for the smallest failing case"
OPTIONS = (
    *("accumulation_steps", "split", "world_size", "strategy", "device", "precision", "train"),
    *("expect", "optimizer_steps", "rows", "rng", "seed", "timeout", "json", "html", "junit"),
    *("github", "color"),
)
CASES = 100


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `search`."""
    parser.add_argument("targets", metavar="TARGET", nargs="*", default=[])
    add_options(parser, *OPTIONS)
    parser.add_argument(
        "--cases",
        metavar="N",
        default=str(CASES),
        help=f"most cases until one fails, and most to shrink it (default {CASES})",
    )
    parser.add_argument(
        "--repro", metavar="PATH", default="repro.py", help="the script (default repro.py)"
    )
    parser.add_argument("-q", action="store_true", dest="quiet", help="the failing case only")


def execute(options: argparse.Namespace) -> int:
    """Search, print the smallest failing case and the commands that repeat it, and return the exit code."""
    settings = resolve(flags(options))
    refuse_targets(options.targets)
    if len(options.targets) > 1:
        raise UsageError(
            f"{len(options.targets)} targets given", expected="one", fix="search them one by one"
        )
    budget = _whole(options.cases)
    path = Path(options.repro)
    _refuse_foreign(path)
    outputs = Outputs(settings)
    with own_stdout() as stdout:
        search = _search(options.targets[0], settings, budget)
        progress = Progress(2 * budget, quiet=options.quiet)
        search.progress = progress.begin
        from equivcheck.ranks.team import kept  # noqa: PLC0415 - torch is loaded by now

        with progress.shown(), kept():
            found = search.first_failure()
            tried = len(search.ran)
            smallest = search.shrunk(found) if found is not None else None
        finished = [case for case in search.ran.values() if case is not None]
        if smallest is None:
            shown: list[Mapping[str, Any]] = [
                case
                for point, case in search.ran.items()
                if case is not None and point.rows is None
            ] or finished[:1]
        else:
            case = search.run(smallest)
            assert case is not None
            shown = [case]
        notes = [f"{len(finished)} cases ran; none of them failed"] if smallest is None else []
        result = results.assemble(shown, target=options.targets[0], notes=notes)
        out = stdout
        paint = text.ansi if colored(settings["color"], out) else text.plain
        if not options.quiet:
            say(out, text.header(results.environment(), settings["seed"]) + "\n")
        if smallest is None:
            for case in shown:
                say(out, text.line(case, paint))
            say(out, f"\n{len(finished)} cases, no failure; {_verdicts(finished)}")
        else:
            case = shown[0]
            say(out, text.block(case, paint))
            say(out, "")
            say(
                out,
                f"found     case {tried} of at most {budget}, {len(search.ran) - tried} more to shrink it",
            )
            say(out, f"smallest  {words.label(case)}")
            say(out, f"run       {_command(options.targets[0], case)}")
            say(out, f"replay    equivcheck replay {case['id']}")
            say(out, f"repro     {_repro(path, options.targets[0], case)}")
        outputs.finish(result, stdout)
    return int(result["exit_code"])


def _search(target: str, settings: Settings, budget: int) -> Any:
    from equivcheck.execute import process_state, seed_all  # noqa: PLC0415 - loaded only to run
    from equivcheck.feed import read_batches  # noqa: PLC0415 - as above
    from equivcheck.search import Search  # noqa: PLC0415 - as above
    from equivcheck.subject import load_subject  # noqa: PLC0415 - as above

    require_device(settings["device"])
    with process_state():
        subject = load_subject(target, settings["train"])
        seed_all(settings["seed"])
        data = read_batches(subject.fresh().batches, settings["optimizer_steps"], settings["rows"])
    template = Case(
        target=subject.target,
        accumulation_steps=1,
        precision=settings["precision"],
        device=settings["device"],
        optimizer_steps=settings["optimizer_steps"],
        seed=settings["seed"],
        rows=settings["rows"],
        train=settings["train"],
        rng=settings["rng"],
    )
    sizes = list(_several(settings["world_size"]))
    worlds = [(size, settings["strategy"] if size > 1 else "none") for size in sizes]
    stated = settings.stated("accumulation_steps")
    splits = _several(settings["split"]) if settings.stated("split") else ("even", "uneven")
    return Search(
        subject,
        template,
        data.rows,
        settings["accumulation_steps"] if stated else DEFAULT_ACCUMULATION_STEPS,
        splits=splits,
        worlds=worlds,
        expect=settings["expect"],
        timeout=settings["timeout"],
        budget=budget,
    )


def _several(value: Any) -> Sequence[Any]:
    return (value,) if isinstance(value, (int, str)) else value


def _whole(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UsageError(f"--cases is {value!r}", expected="a whole number of at least 1")
    return int(value)


def _refuse_foreign(path: Path) -> None:
    """Refuse to overwrite a script that is not one of ours.

    Raises:
        UsageError: It is not, or the place cannot be written.
    """
    from equivcheck.repro import MARK  # noqa: PLC0415 - used by this command alone

    refuse_unwritable("--repro", str(path))
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        if text and not text.startswith(MARK):
            raise UsageError(
                f"--repro {path} is there already, and was not written by a search",
                fix="--repro another.py",
            )


def _command(target: str, case: Mapping[str, Any]) -> str:
    """Return the command line that runs a case without any record of it."""
    what = Case.from_dict(case)
    stated = {
        "accumulation-steps": what.accumulation_steps,
        "split": what.split if what.split != "even" else None,
        "rows": what.rows,
        "world-size": what.world_size if what.world_size > 1 else None,
        "strategy": what.strategy if what.strategy != "none" else None,
        "precision": what.precision if what.precision != "native" else None,
        "train": case.get("train"),
        "seed": what.seed or None,
        "optimizer-steps": what.optimizer_steps if what.optimizer_steps != 8 else None,
    }
    given = [f"--{name} {shlex.quote(str(v))}" for name, v in stated.items() if v is not None]
    return " ".join(["equivcheck run", shlex.quote(target), *given])


def _repro(path: Path, target: str, case: Mapping[str, Any]) -> str:
    from equivcheck.repro import Sources, write  # noqa: PLC0415 - torch is loaded to run

    if case["world_size"] > 1:
        return f"none: the case needs {case['world_size']} processes"
    if results.case_exit_code(case) != 1:
        return "none: the code raises by itself, as the traceback shows"
    fails, said = write(path, Sources(target, case.get("train")), case)
    if fails:
        return f"{path}  ({said})"
    if said:
        return f"none: in plain torch the code raises {said}"
    return "none: in plain torch the two runs agree, so the fault is in the full batch too"


def _verdicts(cases: list[Mapping[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for case in cases:
        counts[case["verdict"]] = counts.get(case["verdict"], 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing ran"
