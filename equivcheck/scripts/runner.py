"""Run a script's command lines in the roles of an experiment, and read what their processes wrote."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equivcheck.attach.launch import Ended, launch
from equivcheck.attach.process import ATTACHED
from equivcheck.attach.server import SHARED
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import Facts, load
from equivcheck.errors import InternalError, StepError, UsageError
from equivcheck.interventions import Intervention
from equivcheck.ranks.merge import merged
from equivcheck.recording import Recording
from equivcheck.scripts.merge import together
from equivcheck.scripts.printed import Number, losses_of

if TYPE_CHECKING:
    from equivcheck.scripts.target import Command

__all__ = ["Run", "Runner", "other_versions"]

# What a process that is torn down badly ends with, after everything was seen: an abort in a destructor.
_TORN_DOWN = {-signal.SIGABRT, 128 + signal.SIGABRT}


@dataclass(frozen=True)
class Run:
    """What a command line did in one role, besides what its recording holds.

    Attributes:
        recording: Of all ranks together.
        facts: Of every rank.
        folder: Where the ranks wrote.
        printed: The losses in the output, by name.
    """

    recording: Recording
    facts: list[Facts]
    folder: Path
    printed: dict[str, list[Number]] = field(default_factory=dict)


class Runner:
    """Starts command lines, and remembers what each run left beside its recording.

    Args:
        progress: Told the role that begins.
        note: Told what a reader of the result is to know.

    Attributes:
        runs: By the id of their recording.
    """

    def __init__(self, progress: Callable[[str], None], note: Callable[[str], None]) -> None:
        self._progress = progress
        self._note = note
        self._folder = Path(tempfile.mkdtemp(prefix="equivcheck-"))
        self._count = 0
        self.runs: dict[int, Run] = {}

    def close(self) -> None:
        """Remove what was kept on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def run(
        self, spec: Spec, command: Command, known: Recording | None, against: Recording | None
    ) -> tuple[Recording, Ended]:
        """Run a command line in one role and return what its processes did, as one recording.

        Args:
            spec: What is asked of the processes; where they write and what they compare with is filled in.
            command: The command line.
            known: The full batch's run, whose samples are recognised; None in that run itself.
            against: The run to compare with.

        Raises:
            StepError: The script raised, or ended with an exit code that is not 0.
            UsageError: A process was killed although the command ended well.
            InternalError: The recorder could not be put in place.
        """
        self._progress(spec.role)
        self._count += 1
        folder = self._folder / f"{self._count:03d}-{spec.role}"
        spec.output = str(folder / "ranks")
        if known is not None:
            facts = self.runs[id(known)].facts
            pairs = [
                (digest, place * each.world_size + each.rank)
                for each in facts
                for place, digest in enumerate(each.digests)
            ]
            pairs.sort(key=lambda pair: pair[1])
            spec.digests, spec.numbers = [p[0] for p in pairs], [p[1] for p in pairs]
            spec.step_samples = [sorted(n for _, n in step.samples) for step in known.steps]
            spec.rule = facts[0].rule
        if against is not None:
            spec.reference = str(self.runs[id(against)].folder)
        ended = launch(
            list(command.words),
            spec,
            folder,
            variables=dict(command.variables),
            server=SHARED,
        )
        if ended.failures:
            raise InternalError(ended.failures[0])
        ranks, facts = self._ranks(folder / "ranks", spec, ended, command)
        self._refuse_failed(spec.role, ended, command, ranks, facts)
        if not ranks:
            if not (folder / ATTACHED).exists():
                self._note(
                    f"no process of {command.text!r} could be watched: none imports torch, or Python ignores its "
                    "environment there (-I, -E, env -i)"
                )
            return Recording(role=spec.role), ended
        if len(ranks) == 1:
            whole = ranks[0]
        elif known is None or spec.role == "reference":
            whole = together(ranks)
        else:
            whole = merged(ranks, known)
        self.runs[id(whole)] = Run(whole, facts, folder / "ranks", losses_of(ended.output))
        return whole, ended

    def _ranks(
        self, folder: Path, spec: Spec, ended: Ended, command: Command
    ) -> tuple[list[Recording], list[Facts]]:
        ranks, facts = [], []
        for each in sorted(
            folder.glob("rank-*"), key=lambda path: int(path.name[5:].split(".")[0])
        ):
            if "." in each.name:
                self._note(f"{command.text}: a second training process of one rank was left out")
                continue
            learned: Sequence[Intervention] = spec.interventions if each.name == "rank-0" else ()
            recording, fact = load(each, finished=False, learned=learned)
            if fact.ended == "running" and not ended.code:
                raise UsageError(
                    f"recording-cut-short: {each.name} of {spec.role} ends after optimizer step "
                    f"{len(recording.steps)}",
                    where=command.text,
                    because="a process was killed, although its command ended well",
                )
            ranks.append(recording)
            facts.append(fact)
        return ranks, facts

    def _refuse_failed(
        self,
        role: str,
        ended: Ended,
        command: Command,
        ranks: list[Recording],
        facts: list[Facts],
    ) -> None:
        """Raise what the script raised; an abort after everything was seen is none of its faults."""
        broken = next((each for each in facts if each.error), None)
        if not ended.code and broken is None:
            return
        whole = bool(facts) and all(each.ended in {"exit", "limit"} for each in facts)
        if broken is None and whole and ended.code in _TORN_DOWN:
            self._note(f"{role}: the command aborted when everything had been seen ({ended.code})")
            return
        steps = max((len(each.steps) for each in ranks), default=0)
        said = broken.error.splitlines()[0] if broken else f"exit code {ended.code}"
        rank = f", rank {broken.rank}" if broken and broken.world_size > 1 else ""
        raise StepError(
            f"script-raised: {said}"[:100],
            where=f"{role}{rank}, optimizer_step {steps}: {command.text}",
            because=None if broken else "the command ended with an exit code that is not 0",
            user_traceback=broken.traceback if broken else ended.output[-4000:],
        )


def other_versions(
    full_batch: Mapping[str, Any], accumulated: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """Return what two environments have in other versions: the name, and both versions."""

    def of(environment: Mapping[str, Any]) -> dict[str, str]:
        plain = {name: environment.get(name) for name in ("python", "torch", "numpy")}
        found = {**environment.get("packages", {}), **plain}
        return {name: str(version) for name, version in found.items() if version}

    one, other = of(full_batch), of(accumulated)
    return [
        (name, one[name], other[name])
        for name in sorted(one.keys() & other.keys())
        if one[name] != other[name]
    ]
