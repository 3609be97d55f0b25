"""Compare two recordings that were made apart: on other machines, or by other versions of a framework.

Nothing is run, so nothing is put right: causes are suspected, never proved. Each optimizer step is compared as long as
both runs started it from the same parameters; after the first difference they no longer do.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from equivcheck.attach.digests import Digest
from equivcheck.attach.store import Facts, load
from equivcheck.attach.watch import Samples
from equivcheck.case import Case
from equivcheck.decide import blank, conclude
from equivcheck.differences import sums_many
from equivcheck.doubts import different_samples, too_coarse, usable
from equivcheck.errors import UsageError
from equivcheck.experiment import Experiment, Interventions
from equivcheck.feed import Key
from equivcheck.fit import Attribution
from equivcheck.observe import compare
from equivcheck.recording import Kept, Recording, Step
from equivcheck.scripts.experiment import ScriptExperiment
from equivcheck.scripts.merge import together
from equivcheck.scripts.target import Command, Script
from equivcheck.verdict import Judgement, Noise, judge, roundoff_of

__all__ = ["RecordedExperiment", "compare_recordings"]

_BLIND: Final = 1.0


class Recorded:
    """What one command line was seen to do.

    Args:
        folder: As `equivcheck record` wrote it.

    Raises:
        UsageError: There is no recording in it, or one is cut short or corrupted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ranks = sorted(folder.glob("rank-*"), key=lambda path: int(path.name[5:].split(".")[0]))
        ranks = [each for each in ranks if "." not in each.name]
        if not ranks:
            raise UsageError(
                f"no-recording: {folder} holds no recording",
                where=str(folder),
                expected="a folder that equivcheck record wrote",
                fix=f"equivcheck record -o {folder} -- python train.py",
            )
        read = [load(each) for each in ranks]
        self.facts = [facts for _, facts in read]
        if len(read) != self.facts[0].world_size:
            raise UsageError(
                f"missing-ranks: {folder} has {len(read)} ranks of {self.facts[0].world_size}",
                where=str(folder),
                fix="record again",
            )
        self.recording = together([recording for recording, _ in read])

    @property
    def digests(self) -> list[tuple[Digest, int]]:
        """What each sample is recognised by, with its number in this recording, in order."""
        found = [
            (digest, place * each.world_size + each.rank)
            for each in self.facts
            for place, digest in enumerate(each.digests)
        ]
        return sorted(found, key=lambda pair: pair[1])


class _Recordings:
    """What stands for a subject: it is named, and cannot be run."""

    repeatable = True
    trained_nothing = (
        "no backward was seen while the command was watched",
        "record the command again, and let it train",
    )

    def __init__(self, target: str) -> None:
        self.target = target


def rekeyed(recorded: Recorded, known: Recorded) -> None:
    """Name the samples of a recording as another one does: the n-th use of a sample is the n-th use there."""
    samples = Samples(known.digests, rank=0, world_size=1)
    names: dict[Key, Key] = {}
    for digest, number in recorded.digests:
        [names[0, number]] = samples.keys([digest])
    for recording in (recorded.recording, *recorded.recording.ranks):
        recording.fetched = [[names.get(key, key) for key in keys] for keys in recording.fetched]
        for step in recording.steps:
            step.samples = frozenset(names.get(key, key) for key in step.samples)


class RecordedExperiment(ScriptExperiment):
    """Two recordings, and a third of the first command as the control if there is one."""

    intervenes = False

    def __init__(
        self, full: Recorded, accumulated: Recorded, control: Recorded | None, case: Case
    ) -> None:
        Experiment.__init__(
            self,
            _Recordings(str(accumulated.folder)),
            case,
            promoted=full.facts[0].promoted and accumulated.facts[0].promoted,
        )
        self._first, self._second, self._third = full, accumulated, control
        self.script = Script(_command(full), _command(accumulated))
        self._axis = 0
        reference = full.recording
        for step in reference.steps:
            step.matched = step.index
        reference.kept = [_kept(full, step) for step in reference.steps]
        self._cache = {("reference", ()): reference}
        for each in (accumulated, *([control] if control else [])):
            rekeyed(each, full)
            _compared(full, each)
        self._cache["candidate", ()] = accumulated.recording
        self._facts_by = {
            id(each.recording): each.facts
            for each in (full, accumulated, *([control] if control else []))
        }
        self._cache["measured",] = True
        self.case = replace(
            case,
            accumulation_steps=self._accumulation_steps(accumulated.recording),
            world_size=len(accumulated.facts),
        )

    def close(self) -> None:
        """Keep the recordings: they are not ours."""

    @property
    def has_native(self) -> bool:
        """Whether runs as written stand beside those in float64: a command was recorded once."""
        return False

    def _facts_of(self, recording: Recording | None) -> list[Facts]:
        return self._facts_by.get(id(recording), [])

    def _run(self, role: str, *_: Any, **__: Any) -> Recording:
        raise UsageError(f"a recording cannot be run again: {role}")

    def printed(self) -> None:
        """Return nothing: a recording leaves what is printed to the command."""

    def control(self, _which: int = 0, *, seed_offset: int = 0, permuted: bool = True) -> Recording:  # noqa: ARG002
        """Return the control, empty if none was recorded."""
        return self._third.recording if self._third else Recording(role="control")

    def other_samples(self) -> dict[str, Any] | None:
        """Return how the samples differ: of two recordings, whatever a third one took, none is like the other then."""
        return self._parted()

    def pieces_recording(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run: what its backwards added was taken along."""
        if interventions:
            raise UsageError("a recording cannot be run again: pieces")
        return self.candidate()

    def noise(self) -> Noise:
        """Return what the control measured, and what the precision allows without one."""
        if ("noise",) not in self._cache:
            reference = self.reference()
            lowered = [*reference.lowered.values(), *self.candidate().lowered.values()]
            if not self.is_promoted:
                lowered += [reference.dtype, reference.autocast]
                lowered += [self.candidate().dtype, self.candidate().autocast]
            controls = [self.control()] if self._third else []
            self._cache["noise",] = Noise(
                self.terms(), controls, roundoff_of(lowered), self.case.accumulation_steps
            )
        return self._cache["noise",]  # type: ignore[no-any-return]

    def judgement(self, interventions: Interventions = (), *, logged: bool = True) -> Judgement:
        """Judge the accumulated recording, up to the first step that starts from other parameters."""
        if interventions:
            raise UsageError("a recording cannot be run again")
        whole = judge(self.reference(), self.candidate(), self.noise(), logged=logged)
        first = min((each.step for each in whole.findings if each.step >= 0), default=-1)
        whole.findings = [each for each in whole.findings if each.step in {first, -1}]
        return whole

    def compared(self) -> list[Step]:
        """Return the steps that both runs start from the same parameters; the first that differs is the last."""
        findings = self.judgement().findings
        steps = self.candidate().steps
        last = min((each.step for each in findings if each.step >= 0), default=len(steps))
        return [step for step in steps if step.matched is not None and step.index <= last]

    def attributions(self, interventions: Interventions = ()) -> list[Attribution]:
        """Return the weights of every step that is compared."""
        compared = {step.index for step in self.compared()}
        return [each for each in super().attributions(interventions) if each.step in compared]

    def facts(self) -> dict[str, Any]:
        """Return what the recordings say of the case."""
        full, accumulated = self._first.facts[0], self._second.facts[0]
        return {
            "accumulation_steps": self.case.accumulation_steps,
            "world_size": accumulated.world_size,
            "recordings": {
                "full_batch": str(self._first.folder),
                "accumulated": str(self._second.folder),
            },
            "environments": {
                "full_batch": full.environment,
                "accumulated": accumulated.environment,
            },
        }


def _kept(full: Recorded, step: Step) -> Kept:
    """Return what is known of the full batch's state after a step: how far it moved each parameter, in the sample."""
    after = full.facts[0].after
    moved = {}
    if 0 < step.index < len(after):
        before, now = after[step.index - 1], after[step.index]
        found = sums_many([(before[name], now[name]) for name in now if name in before])
        moved = {
            name: each.difference_norm
            for name, each in zip([n for n in now if n in before], found, strict=True)
        }
    return Kept(dict(step.sample), dict(step.sample), {}, {}, {}, {}, moved)


def _compared(full: Recorded, other: Recorded) -> None:
    """Measure a recording's gradients and parameters against the full batch's, at the sampled coordinates."""
    reference, recording = full.recording, other.recording
    queues = {
        key: [step for step in reference.steps if step.optimizer == key]
        for key in reference.optimizers
    }
    for step in recording.steps:
        queue = queues.get(step.optimizer, [])
        place = next((i for i, each in enumerate(queue) if each.samples == step.samples), None)
        if place is None:
            continue
        target = queue[place]
        step.matched, step.missing = target.index, place
        del queue[: place + 1]
        _refuse_other_shapes(full, other, target, step)
        step.none_mismatch = []
        step.gradients = compare(target.sample, step.sample, step)
        step.applied = step.gradients
        mine, theirs = other.facts[0].after, full.facts[0].after
        if step.index < len(mine) and target.index < len(theirs):
            after: dict[str, torch.Tensor | None] = dict(theirs[target.index])
            step.parameters = compare(after, dict(mine[step.index]), None)


def _refuse_other_shapes(full: Recorded, other: Recorded, target: Step, step: Step) -> None:
    for name, sample in target.sample.items():
        mine = step.sample.get(name)
        if sample is not None and mine is not None and sample.shape != mine.shape:
            raise UsageError(
                f"other-shapes: {name} has {len(mine)} sampled gradients, not {len(sample)}",
                where=f"{full.folder}, {other.folder}",
                expected="recordings of the same model",
            )


def compare_recordings(
    full: str,
    accumulated: str,
    control: str | None = None,
    *,
    expect: Sequence[str] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the case that two recordings make, as the result has it.

    Args:
        full: Folder of the full batch's recording.
        accumulated: Folder of the accumulated run's.
        control: Folder of a second recording of the full batch: what it differs by is noise.
        expect: Codes of causes that theory predicts.
        progress: Told what is being done.

    Raises:
        UsageError: A recording is missing, cut short, corrupted, or of another model.
    """
    started = time.perf_counter()
    first, second = Recorded(Path(full)), Recorded(Path(accumulated))
    third = Recorded(Path(control)) if control else None
    case = Case(target=f"{full} | {accumulated}", accumulation_steps=1)
    entry = blank(case, tuple(expect), location=accumulated)
    experiment = RecordedExperiment(first, second, third, case)
    if not experiment.is_promoted:
        entry["judged"] = "native"
    if third is None:
        entry["notes"].append(
            "without a control the noise is that of the precision; --control takes a second recording of the full batch"
        )
    off = [name for name, each in ((full, first), (accumulated, second)) if each.recording.dropout]
    if off:
        entry["notes"].append(f"dropout was switched off in {' and '.join(off)}")
    entry["replay"] = _again(full, accumulated, control, expect)
    entry.update(experiment.facts())
    _decide(experiment, entry, tuple(expect), progress)
    if entry["causes"] and all(each["status"] == "suspected" for each in entry["causes"]):
        entry["notes"].append(f"nothing was run again; to prove a cause: {_proof(first, second)}")
    entry["seconds"] = time.perf_counter() - started
    return entry


def _again(full: str, accumulated: str, control: str | None, expect: Sequence[str]) -> str:
    """Return the command line that compares the same recordings again."""
    words = ["equivcheck", "compare", full, accumulated]
    if control:
        words += ["--control", control]
    for each in expect:
        words += ["--expect", each]
    return shlex.join(words)


def _proof(first: Recorded, second: Recorded) -> str:
    """Return the command line that runs what was recorded, with things put right."""
    full, accumulated = _command(first).text, _command(second).text
    return shlex.join(["equivcheck", "run", "--full", full, "--accumulated", accumulated])


def _command(recorded: Recorded) -> Command:
    """Return the command line that was recorded."""
    facts = recorded.facts[0]
    return Command(facts.launched or shlex.join(facts.command), tuple(facts.command))


def _decide(
    experiment: RecordedExperiment,
    entry: dict[str, Any],
    expect: tuple[str, ...],
    progress: Callable[[str], None],
) -> None:
    reference, candidate = experiment.reference(), experiment.candidate()
    if not usable(reference, entry, experiment.subject, experiment.data):
        return
    if different_samples(experiment, entry):
        return
    judgement = experiment.judgement()
    if judgement.same and not judgement.power < _BLIND:
        too_coarse(experiment, entry, judgement)
        return
    compared = experiment.compared()
    for step in candidate.steps:
        if step.index not in {each.index for each in compared}:
            step.gradients, step.applied, step.parameters = {}, {}, {}
    conclude(experiment, entry, judgement, None, expect, progress)
    entry["interventions"] = []  # none can be tried
    if len(compared) < len(candidate.steps):
        entry["notes"].append("later optimizer steps start from other parameters: not compared")
    entry["notes"].append(f"{len(compared)} of {len(reference.steps)} optimizer steps compared")
