"""The folder that one watched process writes, and how it is read.

| file | holds |
| --- | --- |
| recording.json | everything but tensors, with a checksum of itself and of the file beside it |
| recording.safetensors | sampled gradient coordinates and what else is small |
| initial.safetensors, step-00000.safetensors, ... | the full-batch run's own state, for the other roles to be set to |

A folder is complete once its JSON says so; a process that was killed leaves one that says how far it came.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from equivcheck import tensorfile
from equivcheck.attach.codec import decode, encode
from equivcheck.attach.spec import adopt_states, states_of
from equivcheck.errors import UsageError
from equivcheck.interventions import Intervention
from equivcheck.recording import Kept, Recording
from equivcheck.result import write_text
from equivcheck.sampled import Sampled

__all__ = ["SCHEMA", "Facts", "load", "read_kept", "save", "write_kept"]

SCHEMA = "equivcheck.recording/1"
# What is not in recording.json: kept in files of its own.
_APART = {"kept", "initial"}


@dataclass
class Facts:
    """What is known of a process besides the recording of its steps.

    Attributes:
        rank, world_size: As in torch.distributed; 0 and 1 without it.
        ended: How watching ended: "running" until then, "exit", "limit" (all asked for was seen), "exception".
        traceback, error: Of the exception that ended the script.
        digests: The numbers that every sample is recognised by, in order.
        rule: How samples were recognised.
        shapes: Of the tensors of the first forward, by where they stand in the call.
        counts: Per forward, what its rows hold that may be counted, by label.
        reduction: What the loss of the first backward did to its terms: mean, sum, or "" where that is not seen.
        contributions: Per backward, what it added at the sampled coordinates, float64.
        after: Per optimizer step, the parameters after it at the sampled coordinates, float64.
        environment: Versions.
        command: What the process was started as.
        launched: The command line that started all of them; empty where that is not kept.
        promoted: Computed in float64.
        started: Seconds since the epoch.
        states: What interventions know after the run, in order.
        notes: What the reader of the result is to know.
    """

    rank: int = 0
    world_size: int = 1
    ended: str = "running"
    error: str = ""
    traceback: str = ""
    digests: list[tuple[int, int]] = field(default_factory=list)
    rule: dict[str, Any] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    counts: list[dict[str, int]] = field(default_factory=list)
    reduction: str = ""
    contributions: list[Mapping[str, torch.Tensor]] = field(default_factory=list)
    after: list[Sampled] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    launched: str = ""
    promoted: bool = False
    started: float = 0.0
    states: list[Intervention] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def save(folder: Path, recording: Recording, facts: Facts) -> None:
    """Write a recording as it is now, each file atomically, the one that names the others last."""
    tensors: dict[str, torch.Tensor] = {}
    fields = {
        each.name: getattr(recording, each.name)
        for each in dataclasses.fields(recording)
        if each.name not in _APART
    }
    plain = {each.name: getattr(facts, each.name) for each in dataclasses.fields(facts)}
    interventions = plain.pop("states")
    body = {
        "recording": encode(fields, tensors),
        "facts": encode(plain, tensors),
        "states": states_of(interventions, tensors),
    }
    written = tensorfile.save(folder / "recording.safetensors", tensors)
    text = json.dumps(body, separators=(",", ":"))
    whole = {
        "schema": SCHEMA,
        "complete": facts.ended != "running",
        "tensors": written,
        "crc32": zlib.crc32(text.encode()),
        "body": text,
    }
    write_text(folder / "recording.json", json.dumps(whole))


def load(
    folder: Path, *, finished: bool = True, learned: Sequence[Intervention] = ()
) -> tuple[Recording, Facts]:
    """Read a recording.

    Args:
        folder: Where a process wrote.
        finished: Refuse one whose process was ended before it could say so.
        learned: Interventions of that run; they are told what their like learned in it.

    Raises:
        UsageError: A file is missing, cut short or corrupted; the message names it.
    """
    path = folder / "recording.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        schema = whole["schema"]
        text, written = whole["body"], whole["tensors"]
        intact = zlib.crc32(text.encode()) == whole["crc32"]
    except OSError as error:
        raise tensorfile.refused(path, str(error.strerror)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise tensorfile.refused(path, "it is not the JSON of a recording") from None
    if schema != SCHEMA:
        raise UsageError(
            f"recording-schema: {path} has the schema {schema!r}",
            expected=SCHEMA,
            fix="record again with this version of equivcheck",
        )
    if not intact:
        raise tensorfile.refused(path, "its checksum is another one")
    tensors, _ = tensorfile.load(folder / "recording.safetensors", written)
    try:
        body = json.loads(text)
        recording = Recording(**decode(body["recording"], tensors))
        facts = Facts(**decode(body["facts"], tensors))
        if learned:
            adopt_states(learned, body["states"], tensors)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise tensorfile.refused(path, f"{type(error).__name__}: {error}") from None
    if finished and not whole["complete"]:
        raise UsageError(
            f"recording-cut-short: {path} ends after optimizer step {len(recording.steps)}",
            where=str(path),
            expected="a recording whose process came to an end",
            because="the process was killed, or is still running",
            fix="record again",
        )
    return recording, facts


def write_kept(folder: Path, name: str, kept: Kept) -> None:
    """Write what the full-batch run keeps of one step."""
    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(encode(kept, tensors), separators=(",", ":"))
    tensorfile.save(folder / f"{name}.safetensors", tensors, {"kept": structure})


def read_kept(folder: Path, name: str) -> Kept:
    """Read what the full-batch run kept of one step; its pages are read when they are looked at."""
    path = folder / f"{name}.safetensors"
    tensors, metadata = tensorfile.load(path)
    try:
        kept = decode(json.loads(metadata["kept"]), tensors)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise tensorfile.refused(path, f"{type(error).__name__}: {error}") from None
    assert isinstance(kept, Kept)
    return kept


def with_kept(folder: Path, recording: Recording) -> Recording:
    """Return a full-batch recording together with what it keeps of every step."""
    if (folder / "initial.safetensors").exists():
        recording.initial = read_kept(folder, "initial")
    count = 0
    while (folder / f"{step_name(count)}.safetensors").exists():
        recording.kept.append(read_kept(folder, step_name(count)))
        count += 1
    return recording


def step_name(index: int) -> str:
    """Return the name of the file of one optimizer step."""
    return f"step-{index:05d}"
