"""The result of a run as JSON: the one source of truth that every report renders."""

from __future__ import annotations

import json
import math
import numbers
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from equivcheck.errors import UsageError
from equivcheck.shape import kind, misfit

SCHEMA = "equivcheck.result/1"

# Exit code of each verdict; what a run returns is the first of PRIORITY that any case gives.
EXIT_CODES = {
    "equivalent": 0,
    "expected": 0,
    "divergent": 1,
    "precision-loss": 1,
    "error": 3,
    "inconclusive": 4,
    "invalid": 4,
}
_NUMBERS = re.compile(r"\[(?:\n\s+(?:[-+.\deE]+|null|true|false),?)+\n\s+\]")

PRIORITY = (70, 130, 3, 1, 4, 5, 0)
NOTHING_SELECTED, INTERRUPTED = 5, 130


def missing_causes(case: Mapping[str, Any]) -> list[str]:
    """Return the causes that the user, or theory, declared and that this case did not prove."""
    proved = {cause["code"] for cause in case.get("causes") or () if cause["status"] == "proved"}
    return [code for code in case.get("expect") or () if code not in proved]


def case_exit_code(case: Mapping[str, Any]) -> int:
    """Return the exit code that one finished case asks for.

    What a suite's theory expects is a success, whatever it is; what it does not is none, in either direction.
    """
    theory = case.get("theory")
    if theory:
        if theory["met"]:
            return 0
        bare = {name: value for name, value in case.items() if name != "theory"}
        return case_exit_code(bare) or 1
    if case["verdict"] == "error":
        code = (case.get("error") or {}).get("exit_code")
        return code if code in PRIORITY else EXIT_CODES["error"]
    code = EXIT_CODES[case["verdict"]]
    return 1 if code == 0 and missing_causes(case) else code


def hold_against_theory(case: dict[str, Any], theory: Mapping[str, Any]) -> None:
    """Write into a finished case of a suite what theory expects of it, and whether that is met.

    A case that is not equivalent, just as theory says, has the verdict `expected`.

    Args:
        case: Changed in place: `theory`, and where it is met `verdict`.
        theory: Its verdict, causes and source.
    """
    found = case["verdict"]
    causes = case.get("causes") or []
    codes = sorted(cause["code"] for cause in causes)
    proved = all(cause["status"] == "proved" for cause in causes)
    if found == "expected":  # exactly the declared causes, all proved
        found = "divergent"
    met = found == theory["verdict"] and codes == sorted(theory["causes"]) and proved
    case["theory"] = {**theory, "found": found, "met": met}
    if met and found != "equivalent":
        case["verdict"] = "expected"


def exit_code(cases: Sequence[Mapping[str, Any]], *, interrupted: bool = False) -> int:
    """Return the exit code of a whole run: the most pressing of its cases'."""
    codes = {case_exit_code(case) for case in cases} or {NOTHING_SELECTED}
    if interrupted:
        codes.add(INTERRUPTED)
    return min(codes, key=PRIORITY.index)


def run_verdict(cases: Sequence[Mapping[str, Any]], *, interrupted: bool = False) -> str:
    """Return one verdict for a whole run, always in line with its exit code.

    A run without a case is `invalid`, since nothing was compared; one that was interrupted or
    failed inside is `error`, whatever its finished cases say; and a declared cause that did not
    appear makes it `divergent`: from what the user expects.
    """
    code = exit_code(cases, interrupted=interrupted)
    if code in (0, 1, 4):
        found = [case["verdict"] for case in cases if case_exit_code(case) == code]
        worst_first = {
            0: ("expected", "equivalent"),
            1: ("divergent", "precision-loss"),
            4: ("inconclusive", "invalid"),
        }
        return next((verdict for verdict in worst_first[code] if verdict in found), "divergent")
    return "invalid" if code == NOTHING_SELECTED else "error"


def assemble(
    cases: Sequence[Mapping[str, Any]],
    *,
    target: str,
    notes: Sequence[str] = (),
    interrupted: bool = False,
) -> dict[str, Any]:
    """Return the result of a run from its finished cases, JSON-ready."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": run_verdict(cases, interrupted=interrupted),
        "exit_code": exit_code(cases, interrupted=interrupted),
        "target": target,
        "environment": environment(),
        "interrupted": interrupted,
        "notes": list(notes),
        "cases": [finite(case) for case in cases],
    }
    return result


def environment() -> dict[str, Any]:
    """Return the versions and limits that a reader needs to run the same thing again.

    Read from package metadata, so that it costs nothing and works without torch.
    """
    from importlib import metadata  # noqa: PLC0415 - takes longer than all else that a command needs

    facts: dict[str, Any] = {}
    for name in ("equivcheck", "torch", "numpy"):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    facts["python"] = platform.python_version()
    facts["platform"] = f"{platform.system()} {platform.machine()}"
    facts["cpus"] = os.cpu_count()
    return facts


_PLAIN = (str, int, bool, type(None))


def finite(value: Any) -> Any:
    """Return the value as plain JSON types, with non-finite numbers as null.

    A mapping that holds such a number, directly or in a list, gets `"finite": False` beside it,
    so that null for "not computed" stays different from null for infinity.
    """
    kind = type(value)
    if kind in _PLAIN or (kind is float and math.isfinite(value)):  # nearly all there is
        return value
    if isinstance(value, Mapping):
        plain = {str(key): finite(item) for key, item in value.items()}
        if any(_holds_non_finite(item) for item in value.values()):
            plain["finite"] = False
        return plain
    if isinstance(value, (list, tuple, set, frozenset)):
        return [finite(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def _holds_non_finite(value: Any) -> bool:
    kind = type(value)
    if kind is float:
        return not math.isfinite(value)
    if kind in _PLAIN:
        return False
    if isinstance(value, (list, tuple)):
        return any(_holds_non_finite(item) for item in value)
    return (
        isinstance(value, numbers.Real)
        and not isinstance(value, (bool, numbers.Integral))
        and not math.isfinite(value)
    )


def to_json(result: Mapping[str, Any]) -> str:
    """Return the result as JSON text that any parser reads: no NaN, no Infinity."""
    text = json.dumps(finite(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # A list of numbers on one line: thousands of lines of one number each help neither eye nor diff.
    # A line break in a string is escaped, so that this meets the layout alone.
    return _NUMBERS.sub(
        lambda found: " ".join(found[0].split()).replace("[ ", "[")[:-2] + "]", text
    )


def write(path: str | os.PathLike[str], result: Mapping[str, Any]) -> None:
    """Write the result so that a reader sees the old file or the new one, never a part.

    Raises:
        OSError: The file cannot be written; the old one is then still there.
    """
    write_text(path, to_json(result))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text atomically, making the folders it needs; devices and pipes are written directly.

    Raises:
        OSError: The file cannot be written; the old one is then still there.
    """
    target = Path(path)
    # Before links are followed: /dev/stdout into a pipe ends in a name that no file has.
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")  # raises the right error for a folder
        return
    target = target.resolve()  # a link stays a link, its target is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk shows here, not after the rename
        draft.replace(target)
    finally:
        with suppress(OSError):
            draft.unlink()


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a saved result.

    A verdict that is absent is that of its cases.

    Raises:
        UsageError: The file is missing, unreadable, no JSON (truncated, say), not a result of this schema, or holds
            something of another kind than a result does.
    """
    name = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read the result {name}: {reason}", expected=_EXPECTED) from None
    try:
        result = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{name} is not JSON: {error}", expected=_EXPECTED, because=_why_not_json(text, error)
        ) from None
    if not isinstance(result, dict):
        raise UsageError(
            f"{name} is JSON, but no result: it is {kind(result)}, not a table", expected=_EXPECTED
        )
    schema = result.get("schema")
    if schema != SCHEMA:
        raise UsageError(
            f"{name} has the schema {schema!r}" if "schema" in result else f"{name} has no schema",
            expected=SCHEMA,
            because=None if "schema" in result else "it is JSON, but not a result of equivcheck",
            fix="run the target again with this version of equivcheck",
        )
    told = misfit(result) or _unknown_verdict(result)
    if told:
        raise UsageError(
            f"{name}: {told}",
            expected=_EXPECTED,
            because="it was changed since, or written by something else",
        )
    result.setdefault("target", "")
    if result.get("verdict") is None:
        result["verdict"] = run_verdict(
            result["cases"], interrupted=bool(result.get("interrupted"))
        )
    return finite(result)  # type: ignore[no-any-return]


_EXPECTED = "a file written by equivcheck run --json"


def _no_constant(name: str) -> None:
    raise ValueError(f"it holds {name}, which JSON does not have")


def _why_not_json(text: str, error: Exception) -> str | None:
    """Return why a file does not parse, where that can be told."""
    if not text.strip():
        return "the file is empty"
    if not text.lstrip().startswith(("{", "[")):
        return "it is text of another kind"
    at = getattr(error, "pos", None)
    if at is not None and (at >= len(text.rstrip()) or "Unterminated string" in str(error)):
        return "the file is cut short"
    return None


def _unknown_verdict(result: Mapping[str, Any]) -> str | None:
    for number, case in enumerate(result["cases"]):
        if case["verdict"] not in EXIT_CODES:
            known = ", ".join(EXIT_CODES)
            return f"cases[{number}].verdict is {case['verdict']!r}, an unknown verdict: {known}"
    return None
