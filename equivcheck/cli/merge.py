"""Put the results of several runs, shards mostly, together into one. Needs no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equivcheck import result as results
from equivcheck.cli.outputs import refuse_unwritable
from equivcheck.errors import UsageError
from equivcheck.report import matrix, text, words

HELP = "put the results of shards together"

# What a case may say otherwise when it is run twice: how long it took, and rounding.
_DECIDING = ("verdict", "expect", "theory")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `merge`."""
    parser.add_argument("results", metavar="RESULT", nargs="+")
    parser.add_argument("--json", metavar="PATH", required=True, help="the whole; - for stdout")


def execute(options: argparse.Namespace) -> int:
    """Write the whole, print its matrix and summary, and return its exit code."""
    if options.json != "-":
        refuse_unwritable("--json", options.json)
    whole = merged({path: results.load(path) for path in _each_once(options.results)})
    out = sys.stdout
    if options.json == "-":
        sys.stdout.write(results.to_json(whole))
        out = sys.stderr
    else:
        results.write(options.json, whole)
    for block in text.blocks(filter(words.failed, whole["cases"])):
        print("\n" + block, file=out)
    shown = matrix.render(whole)
    for part in (shown, *text.remarks(whole), "\n" + text.summary(whole)):
        if part:
            print(part, file=out)
    return int(whole["exit_code"])


def merged(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return one result with the cases of all.

    Args:
        parts: Results by the path they were read from.

    Raises:
        UsageError: Two of them have the same case and disagree about it, were made by other versions, or are no
            shards of one run.
    """
    _refuse_other_shards(parts)
    cases: dict[str, Mapping[str, Any]] = {}
    origin: dict[str, str] = {}
    for path, part in parts.items():
        for case in part["cases"]:
            identity = str(case["id"])
            if identity in cases and _decided(cases[identity]) != _decided(case):
                before, now = (
                    " ".join([each["verdict"], *words.codes(each)])
                    for each in (cases[identity], case)
                )
                raise UsageError(
                    f"results disagree about case {identity}: {before}, and {now}",
                    where=f"{origin[identity]} and {path}",
                    expected="the same verdict and causes wherever a case was run",
                    fix=f"equivcheck replay {identity} --result {path}",
                )
            origin.setdefault(identity, path)
            cases.setdefault(identity, case)
    _refuse_other_versions(parts)
    absent = _absent_shards(list(parts.values()))
    notes = list(dict.fromkeys(note for part in parts.values() for note in part.get("notes") or ()))
    if absent:
        notes.append(f"partial: there is no result of shard {', '.join(absent)}")
    planned = max((part.get("planned") or 0 for part in parts.values()), default=0)
    if planned > len(cases) and not absent:
        notes.append(
            f"partial: {planned - len(cases)} of {planned} cases are in none of the results"
        )
    targets = dict.fromkeys(word for part in parts.values() for word in part["target"].split())
    whole = results.assemble(
        list(cases.values()),
        target=" ".join(targets),
        notes=notes,
        interrupted=planned > len(cases)
        or bool(absent)
        or any(part.get("interrupted") for part in parts.values()),
    )
    if planned > len(cases):
        whole["planned"] = planned
    whole["environment"] = next(iter(parts.values()))["environment"]
    return whole


def _each_once(paths: Sequence[str]) -> Sequence[str]:
    found: dict[Path, str] = {}
    for path in paths:
        other = found.setdefault(Path(path).resolve(), path)
        if other is not path:
            raise UsageError(
                f"results overlap: {path} is there twice",
                where=f"{other} and {path}",
                expected="each result once",
                fix="leave one of them out",
            )
    return paths


def _decided(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(case.get(name) for name in _DECIDING), sorted(words.codes(case)))


def _refuse_other_shards(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse shards that are no parts of one run: what is missing between them would not be seen."""
    shards = {path: part["shard"] for path, part in parts.items() if part.get("shard")}
    if len({shard.partition("/")[2] for shard in shards.values()}) > 1:
        raise UsageError(
            f"shards of other runs: {', '.join(shards.values())}",
            where=", ".join(shards),
            expected="I/N with the same N",
            fix="merge the shards of one run first",
        )
    _refuse_other_runs({path: parts[path] for path in shards})
    found: dict[str, str] = {}
    for path, shard in shards.items():
        if shard in found:
            raise UsageError(
                f"shards overlap: {shard} is there twice",
                where=f"{found[shard]} and {path}",
                expected="one result of each shard",
                fix="leave one of them out",
            )
        found[shard] = path
    owner: dict[str, str] = {}
    for path, shard in shards.items():
        for case in parts[path]["cases"]:
            other = owner.setdefault(str(case["id"]), path)
            if other != path:
                raise UsageError(
                    f"shards overlap: case {case['id']} is in {shards[other]} and in {shard}",
                    where=f"{other} and {path}",
                    expected="shards of one list of cases, which have none in common",
                    because="they were made with other targets, another -k or other suites",
                    fix="the same command with each --shard",
                )


# What every case of one run shares; a suite's rows may differ in all else.
_SHARED = ("seed", "device", "train")


def _refuse_other_runs(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse shards of which one was made with another command, or with other code."""
    known: dict[str, tuple[str, Any]] = {}
    for path, part in parts.items():
        for name, value in _made_with(part).items():
            other, before = known.setdefault(name, (path, value))
            if before != value:
                raise UsageError(
                    f"shards of other runs: {name} is {_told(before)}, and {_told(value)}",
                    where=f"{other} and {path}",
                    expected=f"one {name} in all shards",
                    because="shards are parts of one run; what is missing between two runs would not be seen",
                    fix="the same command with each --shard",
                )


def _made_with(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all cases of a run have in common, as far as its result says it."""
    run = part.get("run") or {}
    common: dict[str, Any] = {"target": part["target"]}
    for name in _SHARED:
        values = {case.get(name) for case in part["cases"] if name in case}
        if len(values) == 1:
            [common[name]] = values
    common |= run.get("settings") or {}
    return common | {f"code of {name}": digest for name, digest in (run.get("code") or {}).items()}


def _told(value: Any) -> str:
    return "none" if value is None else str(value)


def _refuse_other_versions(parts: Mapping[str, Mapping[str, Any]]) -> None:
    for name in ("equivcheck", "torch"):
        found = {path: (part.get("environment") or {}).get(name) for path, part in parts.items()}
        if len(set(found.values())) > 1:
            raise UsageError(
                f"results are of other versions of {name}: {', '.join(map(str, found.values()))}",
                where=", ".join(found),
                expected="shards of one run",
                fix="equivcheck diff compares results of other versions",
            )


def _absent_shards(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the shards of which no result is there, as in `3/5`."""
    given = {part["shard"] for part in parts if part.get("shard")}
    counts = {shard.partition("/")[2] for shard in given}
    return [
        f"{number}/{count}"
        for count in sorted(counts)
        for number in range(1, int(count) + 1)
        if f"{number}/{count}" not in given
    ]
