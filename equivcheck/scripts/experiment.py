"""The experiment for a script: every role is a run of one of two command lines, watched from outside.

| role | command | arithmetic |
| --- | --- | --- |
| reference | full batch | float64 |
| control | full batch, parameters off by one rounding | float64 |
| candidate | accumulated | float64 |
| native_reference, native_candidate | full batch, accumulated | as written |
| pieces | accumulated, every micro-batch from the state its cycle starts from | float64 |

Samples are numbered in the order in which the full batch used them. A command line cannot be given single
micro-batches, so a piece is what one backward of the accumulated run adds, scaled so that the full batch's weights add
up to 1, as those of a mean do (to K, where its loss is a sum).

K micro-batches per cycle, R ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from equivcheck.attach.digests import LISTED, lists_in
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import Facts, with_kept
from equivcheck.case import Case
from equivcheck.experiment import ByPlace, Experiment, Interventions
from equivcheck.feed import Data, Key
from equivcheck.fit import Attribution
from equivcheck.recording import Place, Recording, Step
from equivcheck.scripts.pieces import addends_of, attribution_of, pieces_of
from equivcheck.scripts.printed import differing
from equivcheck.scripts.runner import Runner, other_versions
from equivcheck.scripts.samples import first_difference

if TYPE_CHECKING:
    from equivcheck.scripts.target import Command, Script


class ScriptData(Data):
    """The full batches of a script: a number of rows each; epochs may end in incomplete ones all along.

    Args:
        cycles: The samples of each, and the optimizer that used them first.
    """

    def __init__(self, cycles: Sequence[tuple[str, frozenset[Key]]]) -> None:
        super().__init__([None] * len(cycles), [len(samples) for _, samples in cycles])
        object.__setattr__(self, "_cycles", cycles)

    @property
    def tail(self) -> set[int]:
        """The samples of every full batch that is shorter than the longest of the same optimizer."""
        cycles: Sequence[tuple[str, frozenset[Key]]] = self._cycles  # type: ignore[attr-defined]
        longest: dict[str, int] = {}
        for optimizer, samples in cycles:
            longest[optimizer] = max(longest.get(optimizer, 0), len(samples))
        return {n for name, each in cycles if len(each) < longest[name] for _, n in each}


class ScriptExperiment(Experiment):
    """Runs one case by command lines, and remembers what was run.

    Args:
        script: The command lines.
        case: The point of the matrix; its accumulation steps are those that the runs show.
        progress: Told the role that begins.
        promoted: Judge in float64; otherwise every role computes as written.
    """

    reseeds_forwards = True
    # Each takes seconds: a new process, and the script from its first line.
    trials = 20
    other_steps = False

    def __init__(
        self,
        script: Script,
        case: Case,
        progress: Callable[[str], None] = lambda _: None,
        *,
        promoted: bool = True,
    ) -> None:
        super().__init__(script, case, progress, promoted=promoted)
        self.script = script
        self._runner = Runner(progress, self._note)
        self._axis = 0

    def close(self) -> None:
        """Remove what was kept on disk."""
        self._runner.close()

    def limit(self, seconds: float | None) -> None:
        """Leave it to the deadline of this process, which ends the commands too."""

    # ---- running -------------------------------------------------------------------------------

    def _run(
        self,
        role: str,
        command: Command,
        observer: str,
        *,
        against: Recording | None = None,
        interventions: Interventions = (),
        schedule: Sequence[Place] = (),
        **fields: Any,
    ) -> Recording:
        """Run a command line in one role and return what its processes did, as one recording."""
        native = role.startswith("native")
        spec = Spec(
            role,
            "",
            observer,
            promoted=self.is_promoted and not native,
            native=native and self.is_promoted,
            optimizer_steps=self.script.optimizer_steps,
            schedule=list(schedule),
            interventions=list(interventions),
            **fields,
        )
        if any(each.shorter for each in interventions):
            tail = self.data.tail
            spec.stop_cycle = min(
                step.index for step in self.reference().steps for _, n in step.samples if n in tail
            )
        lengths = [each.length for each in interventions if each.length is not None]
        if lengths:
            spec.length = lengths[0]
        known = against or self._cache.get(("reference", ()))
        recording, ended = self._runner.run(spec, command, known, against)
        recording.seconds = ended.seconds
        self.runs.append({"role": role, "seconds": ended.seconds})
        return recording

    def _facts_of(self, recording: Recording | None) -> list[Facts]:
        """Return what is known of every rank of a run besides its recording."""
        run = self._runner.runs.get(id(recording))
        return run.facts if run is not None else []

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    # ---- roles ---------------------------------------------------------------------------------

    def reference(self, interventions: Interventions = ()) -> Recording:
        """Return the full-batch run in float64."""
        interventions = tuple(each for each in interventions if each.both)

        def make() -> Recording:
            rule = {"axis": self._axis} if self._axis else {}
            found = self._run(
                "reference", self.script.full, "write", interventions=interventions, rule=rule
            )
            run = self._runner.runs.get(id(found))
            if run is not None:
                with_kept(run.folder / "rank-0", found)
            return found

        return self._once(("reference", interventions), make)

    def reference_of_length(self, length: int) -> Recording:
        """Return the full-batch run whose `len(loader)` says something else."""
        return self._once(
            ("length", length),
            lambda: self._run(
                "full_batch", self.script.full, "compare", against=self.reference(), length=length
            ),
        )

    def reference_of_horizon(self, steps: int) -> Recording:
        """Return the same: a script learns the number of its optimizer steps from its loader alone."""
        return self.reference_of_length(steps)

    def altered_reference(self, interventions: Interventions) -> Recording:
        """Return the full-batch run with something put right, compared with the one as written."""
        return self._once(
            ("altered", interventions),
            lambda: self._run(
                "reference",
                self.script.full,
                "compare",
                against=self.reference(),
                interventions=interventions,
                schedule=self.reference().places(self.cycles()),
            ),
        )

    def control(self, which: int = 0, *, seed_offset: int = 0, permuted: bool = True) -> Recording:
        """Return the full-batch run with parameters off by one rounding, or repeated as it is.

        The rows of a script's batches are not ours to permute: the noise is that of perturbed parameters, of which
        `which` chooses the signs.
        """
        return self._once(
            ("control", which, seed_offset, permuted),
            lambda: self._run(
                "control",
                self.script.full,
                "perturb" if permuted else "compare",
                against=self.reference(),
                seed_offset=seed_offset,
                perturbation=which,
            ),
        )

    def perturbed(self) -> Recording:
        """Return the control: it is perturbed already."""
        return self.control()

    def candidate(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in float64."""
        reference = self.reference(interventions)

        def make() -> Recording:
            return self._run(
                "candidate",
                self.script.accumulated,
                "compare",
                against=reference,
                interventions=interventions,
                schedule=self.schedule_for(interventions),
            )

        found = self._once(("candidate", interventions), make)
        if not interventions and ("measured",) not in self._cache:
            axis = self._other_axis(found)
            if axis:
                self._axis = axis
                self._cache.clear()
                return self.candidate()
            self._cache["measured",] = True
            self.case = replace(
                self.case,
                accumulation_steps=self._accumulation_steps(found),
                world_size=max(len(found.ranks), 1),
            )
        return found

    def _other_axis(self, candidate: Recording) -> int:
        """Return where the samples are, where no row is known: in dimension 1, or in a list; 0 for neither."""
        if self._axis or not candidate.fetched:
            return 0
        if any(not is_other for keys in candidate.fetched for is_other, _ in keys):
            return 0
        [full, *_], [mine, *_] = self._facts_of(self.reference()), self._facts_of(candidate)
        whole, part = lists_in(list(full.shapes)), lists_in(list(mine.shapes))
        if any(whole[name] > part[name] for name in whole.keys() & part.keys()):
            return LISTED
        pairs = [
            (full.shapes[path], mine.shapes[path])
            for path in full.rule["paths"]
            if path in full.shapes and path in mine.shapes
        ]
        is_time_first = bool(pairs) and all(
            len(a) == len(b) > 1 and a[0] == b[0] and a[1] != b[1] for a, b in pairs
        )
        return int(is_time_first)

    def native(self, role: str) -> Recording:
        """Return native_reference or native_candidate: as written, from the reference's states."""

        def make() -> Recording:
            promoted = self.reference() if role == "native_reference" else self.candidate()
            # Digests of what is computed in another precision are others: steps are matched as in the promoted run.
            boundaries = [step.matched for step in promoted.steps]
            command = self.script.full if role == "native_reference" else self.script.accumulated
            return self._run(
                role,
                command,
                "compare" if role == "native_reference" else "contribute",
                against=self.reference(),
                boundaries=boundaries,
            )

        return self._once((role,), make)

    def pieces_recording(self, interventions: Interventions = ()) -> Recording:
        """Return the accumulated run in which every micro-batch starts from its cycle's state."""
        interventions = tuple(each for each in interventions if each.both)
        return self._once(
            ("pieces", interventions),
            lambda: self._run(
                "pieces",
                self.script.accumulated,
                "contribute",
                against=self.reference(interventions),
                interventions=interventions,
                schedule=self.schedule(),
            ),
        )

    def addends_alone(self, alone: ByPlace, whole: ByPlace) -> ByPlace:
        """Return the addends of the micro-batches alone: what each adds, scaled as the full batch has it."""
        return addends_of(
            alone, whole, is_sum=self._facts_of(self.reference())[0].reduction == "sum"
        )

    # ---- geometry ------------------------------------------------------------------------------

    @property
    def data(self) -> Data:
        """The full batches, as far as a script shows them: their rows, and which are incomplete."""
        steps, found = self.reference().steps, self._cycle_samples()
        return ScriptData([(steps[cycle].optimizer, found[cycle]) for cycle in found])

    def _cycle_samples(self) -> dict[int, frozenset[Key]]:
        """Return, by the full batch's step that used them first, the samples: in order."""
        found: dict[int, set[Key]] = {}
        for key, cycle in self.cycles().items():
            found.setdefault(cycle, set()).add(key)
        return {cycle: frozenset(found[cycle]) for cycle in sorted(found)}

    def data_for(self, interventions: Interventions, *, promoted: bool) -> Data:  # noqa: ARG002 - as the base
        """Return the data of a run."""
        return self.data.shorter() if any(each.shorter for each in interventions) else self.data

    def cycle_of(self, step: Step, cycles: Mapping[Key, int]) -> int:
        """Return the cycle of a reference step: of several forwards of the same rows, the last ones."""
        return max((cycles[key] for key in step.samples if key in cycles), default=-1)

    def _micro_batches(self) -> dict[int, list[list[Key]]]:
        """Return the micro-batches of the accumulated run by the full batch's step: rank 0's, then rank 1's ..."""
        cycles, candidate = self.cycles(), self.candidate()
        found: dict[int, list[list[Key]]] = {}
        for rank in candidate.ranks or [candidate]:
            for keys in rank.fetched:
                cycle = cycles.get(keys[0], -1)
                if cycle >= 0:
                    found.setdefault(cycle, []).append(keys)
        return found

    def _accumulation_steps(self, candidate: Recording) -> int:
        """Return K: how many micro-batches most cycles of a rank have, per one of the full batch."""
        cycles = self.cycles()
        if not any(candidate.fetched):
            # No module was called: optimizer steps are matched in order, and backwards tell.
            steps = max(len(candidate.steps), 1)
            return max(round(len(candidate.backwards) / steps), 1)
        counts = Counter(
            cycles[keys[0]] for keys in candidate.fetched if keys and keys[0] in cycles
        )
        own = Counter(
            cycles[keys[0]] for keys in self.reference().fetched if keys and keys[0] in cycles
        )
        shares = [count // own[cycle] for cycle, count in counts.items() if own[cycle]]
        return max(Counter(shares).most_common(1)[0][0], 1) if shares else 1

    def micro_batches(self, data: Data) -> list[list[int]]:
        """Return the samples of every micro-batch."""
        micro = self._micro_batches()
        return [
            [number for _, number in keys]
            for cycle in list(self._cycle_samples())[: len(data.rows)]
            for keys in micro.get(cycle, [])
        ]

    def counts(self, _: int | None) -> dict[str, list[list[float]]]:
        """Return what each micro-batch holds of what may be counted, by label; for every step of the full batch."""
        cycles, candidate = self.cycles(), self.candidate()
        counted: dict[int, list[dict[str, int]]] = {}
        ranks = candidate.ranks or [candidate]
        for rank, facts in zip(ranks, self._facts_of(candidate), strict=False):
            for keys, counts in zip(rank.fetched, facts.counts, strict=False):
                cycle = cycles.get(keys[0], -1)
                if cycle >= 0:
                    counted.setdefault(cycle, []).append(counts)
        every = [counts for each in counted.values() for counts in each]
        labels = [
            label for label in (every[0] if every else {}) if all(label in each for each in every)
        ]
        # Two optimizers may step on the same samples.
        of_step = [self.cycle_of(step, cycles) for step in self.reference().steps]
        return {
            label: [[counts[label] for counts in counted.get(cycle, [])] for cycle in of_step]
            for label in labels
        }

    def terms(self) -> int:
        """Return the length of the longest sum behind a gradient: rows times the length of a row."""
        facts = self._facts_of(self.reference())
        length = max((int(each.rule.get("row_length", 1)) for each in facts), default=1)
        return max(self.data.rows, default=1) * length

    # ---- what follows from the runs ------------------------------------------------------------

    def facts(self) -> dict[str, Any]:
        """Return the commands, and what they have shown of the case."""
        candidate = self._cache.get(("candidate", ()))
        ranks = self._facts_of(candidate)
        found: dict[str, Any] = {
            "full_command": self.script.full.text,
            "accumulated_command": self.script.accumulated.text,
            "versions": list(self.script.versions),
        }
        if ranks:
            found["accumulation_steps"] = self.case.accumulation_steps
            found["world_size"] = ranks[0].world_size
            found["environments"] = {
                "full_batch": self._facts_of(self.reference())[0].environment,
                "accumulated": ranks[0].environment,
            }
            for name, one, other in other_versions(**found["environments"]):
                self._note(f"{name} {one} in the full batch's environment, {other} in the other")
            if any(each.ended == "limit" for each in ranks):
                found["ended_after_optimizer_steps"] = len(self.reference().steps)
        return found

    def other_samples(self) -> dict[str, Any] | None:
        """Return how the samples differ, with the first optimizer step in which they do; empty if they do not."""
        control = self.control()
        if len(control.steps) < len(self.reference().steps) or any(
            step.matched is None for step in control.steps
        ):
            return {}  # The full batch does not take the same samples twice: no run is like another.
        return self._parted()

    def _parted(self) -> dict[str, Any]:
        """Return where the accumulated run takes other samples than the full batch; empty if it never does."""
        firsts = self._firsts()
        found = first_difference(firsts, self.candidate(), self.cycles(), self.data.tail)
        return {**found, "recognised_by": self._recognised_by()} if found else {}

    def printed(self) -> dict[str, Any] | None:
        """Return how a loss that both commands print at every optimizer step differs."""
        reference, candidate = self.reference(), self.candidate()
        found = differing(
            self._runner.runs[id(reference)].printed,
            self._runner.runs[id(candidate)].printed,
            candidate,
            len(self._cycle_samples()),
            self.case.accumulation_steps,
        )
        # One of several ranks may print the loss of its own share: the truth about what it saw.
        return None if found and not found["exact"] and candidate.ranks else found

    def _firsts(self) -> list[Step]:
        """Return the first step of the full batch for every set of samples."""
        found: dict[frozenset[Key], Step] = {}
        for step in self.reference().steps:
            found.setdefault(step.samples, step)
        return list(found.values())

    def _recognised_by(self) -> list[str]:
        facts = self._facts_of(self.reference())
        return list(facts[0].rule.get("paths", [])) if facts else []

    def attributions(self, interventions: Interventions = ()) -> list[Attribution]:
        """Return the weights of every matched step, from what each backward added."""

        def make() -> list[Attribution]:
            alone = self.pieces_recording(interventions)
            facts = self._facts_of(alone)
            reference, candidate = self.reference(interventions), self.candidate(interventions)
            is_sum = self._facts_of(self.reference())[0].reduction == "sum"
            cycles = self.cycles(interventions)
            pieces = pieces_of(alone, facts, cycles)
            found = []
            for step in candidate.steps:
                if step.matched is None:
                    continue
                target = reference.steps[step.matched]
                cycle = self.cycle_of(target, cycles)
                rows = pieces.get(cycle)
                if rows:
                    start = reference.kept[cycle - 1] if cycle > 0 else reference.initial
                    found.append(
                        attribution_of(step, target, rows, start, is_sum=is_sum, ranks=len(facts))
                    )
            return found

        return self._once(("attributions", interventions), make)
