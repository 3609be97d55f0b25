"""Name the causes of a divergence, and prove them by putting them right.

A set of causes is proved when all its interventions together bring the accumulated run back within
noise and leaving out any one of them does not. Sets of one are tried first, then of two and three;
each run that was partly put right is looked at again, because a second fault may show its signature
only then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from equivcheck.causes import CAUSES
from equivcheck.detectors import suspect
from equivcheck.detectors.logging import explained
from equivcheck.errors import EquivcheckError
from equivcheck.experiment import Experiment, Interventions
from equivcheck.verdict import Finding, Judgement, overall
from equivcheck.view import Suspicion, View

LARGEST_SET: Final = 3
# Runs spent on proofs; a tiny subject takes some 20 ms each.
TRIALS: Final = 60
FRONTIER: Final = 6


@dataclass(frozen=True)
class Node:
    """Some suspicions, each with the way in which it is put right."""

    parts: tuple[tuple[Suspicion, Interventions], ...] = ()

    @property
    def interventions(self) -> Interventions:
        """All interventions together."""
        return tuple(each for _, variant in self.parts for each in variant)

    @property
    def codes(self) -> set[str]:
        """The codes put right."""
        return {suspicion.code for suspicion, _ in self.parts}

    def without(self, index: int) -> Node:
        """Return the node without one part."""
        return Node((*self.parts[:index], *self.parts[index + 1 :]))


@dataclass
class Diagnosis:
    """Causes in order, what was tried, and what was ruled out.

    Attributes:
        causes: Entries of the result.
        trials: Runs with something put right.
        ruled_out: Codes that were suspected and did not hold.
        put_right: Interventions bring the gradients back within noise.
    """

    causes: list[dict[str, Any]] = field(default_factory=list)
    trials: list[dict[str, Any]] = field(default_factory=list)
    ruled_out: list[str] = field(default_factory=list)
    put_right: bool = False

    @property
    def explained(self) -> bool:
        """Return whether anything was found that explains the divergence, if only suspected."""
        return any(each["code"] != "EQ000" for each in self.causes)


class Search:
    """The search for a set of causes of one experiment."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._root = View(experiment)
        self._tried: dict[Interventions, Judgement | None] = {}
        self._suspected: dict[Interventions, list[Suspicion]] = {}
        self._log: bool | None = None
        self.diagnosis = Diagnosis()

    def run(self) -> Diagnosis:
        """Search, and return what was found."""
        frontier = [Node()]
        for _ in range(LARGEST_SET):
            following: list[tuple[float, Node]] = []
            for node in frontier:
                found = self._expand(node, following)
                if found is not None:
                    self._report(*found)
                    return self.diagnosis
            following.sort(key=lambda item: item[0])
            frontier = [node for _, node in following[:FRONTIER]]
            if not frontier:
                break
        self._unproved()
        return self.diagnosis

    def _expand(
        self, node: Node, following: list[tuple[float, Node]]
    ) -> tuple[Node, list[Suspicion]] | None:
        specials = self._proved(node)
        before = self._judge(node)
        if self._resolved(before, specials):
            return self._least(node, specials)
        for suspicion in self._suspicions(node):
            if suspicion.code in node.codes:
                continue
            for variant in suspicion.variants:
                trial = Node((*node.parts, (suspicion, variant)))
                judgement = self._judge(trial)
                if judgement is None:
                    continue
                if before is not None and _alike(judgement, before):
                    continue  # What changes nothing hides nothing either: all that is suspected stays.
                later = self._specials(trial, judgement)
                if self._resolved(judgement, later):
                    return self._least(trial, later)
                following.append((_size(judgement), trial))
        return None

    def _suspicions(self, node: Node) -> list[Suspicion]:
        """Return what is suspected of a run, each time the same objects: what was tried is known by them."""
        if node.interventions not in self._suspected:
            view = View(self._experiment, node.interventions) if node.parts else self._root
            try:
                self._suspected[node.interventions] = suspect(view)
            except EquivcheckError:
                self._suspected[node.interventions] = []
        return self._suspected[node.interventions]

    def _specials(self, node: Node, judgement: Judgement) -> list[Suspicion]:
        return [] if judgement.same else self._proved(node)

    def _proved(self, node: Node) -> list[Suspicion]:
        """Return what is proved of a run by means of its own."""
        return [
            each
            for each in self._suspicions(node)
            if each.proved and each.explains and each.code not in node.codes
        ]

    def _needed(
        self, node: Node, judgement: Judgement, specials: list[Suspicion]
    ) -> list[Suspicion]:
        kinds = judgement.kinds()
        if node.parts and self._log_is_explained():
            kinds -= {"logged"}
        return [each for each in specials if each.explains & kinds]

    def _log_is_explained(self) -> bool:
        """Return whether the wrong weights of the gradients are seen in the log as well: one fault, not two."""
        if self._log is None:
            # A log that differs alone has no other fault to be explained by.
            self._log = self._root.judgement.kinds() != {"logged"} and explained(self._root)
        return self._log

    def _judge(self, node: Node) -> Judgement | None:
        """Run the loop with a node's interventions and judge it; None if the loop does not survive them."""
        key = node.interventions
        if key not in self._tried:
            if len(self._tried) > min(TRIALS, self._experiment.trials):
                return None
            try:
                judgement = self._experiment.judgement(node.interventions)
            except EquivcheckError:
                judgement = None
            self._tried[key] = judgement
            if node.parts:
                self.diagnosis.trials.append(
                    {
                        "codes": sorted(node.codes),
                        "put_right": [each.name for each in node.interventions],
                        "within_noise": self._resolved(judgement, ()),
                        "relative": self._remaining(node, judgement),
                    }
                )
        return self._tried[key]

    def _remaining(
        self, node: Node, judgement: Judgement | None, specials: Sequence[Suspicion] = ()
    ) -> float | None:
        """Return what is left and has no other explanation: of a run within noise, the noise itself."""
        if judgement is None:
            return None
        left = self._left(judgement, specials)
        if left:
            return _largest(left)
        if (
            judgement.left is not None
        ):  # The run was judged by what becomes of the parameters after the steps.
            return max((overall(s.parameters).relative for s in judgement.left.steps), default=0.0)
        steps = self._experiment.candidate(node.interventions).steps
        return max(
            (overall(step.gradients).relative for step in steps if step.matched is not None),
            default=0.0,
        )

    def _resolved(self, judgement: Judgement | None, specials: Sequence[Suspicion]) -> bool:
        return judgement is not None and not self._left(judgement, specials)

    def _left(self, judgement: Judgement, specials: Sequence[Suspicion]) -> list[Finding]:
        """Return the findings that nothing explains: no other cause, nor wrong weights that are in the log as well."""
        aside = {kind for each in specials for kind in each.explains}
        left = [each for each in judgement.findings if each.kind not in aside]
        if {each.kind for each in left} == {"logged"} and self._log_is_explained():
            left.clear()
        return left

    def _before(self, judgement: Judgement, specials: Sequence[Suspicion]) -> float:
        """Return the difference, as written, in the kinds that interventions are to put right."""
        aside = {kind for each in specials for kind in each.explains}
        own = [each for each in judgement.findings if each.kind not in aside]
        if "logged" in judgement.kinds() and self._log_is_explained():
            own = [each for each in own if each.kind != "logged"]
        return _largest(own or judgement.findings)

    def _least(self, node: Node, specials: list[Suspicion]) -> tuple[Node, list[Suspicion]]:
        """Return what is left of a node that puts all right when nothing more can be left out, and what else is needed.

        A part may have served to see another one only: old gradients that both runs hold hide what weights are wrong.
        """
        judgement = self._judge(node)
        assert judgement is not None
        for index in range(len(node.parts) if len(node.parts) > 1 else 0):
            if self._resolved(self._judge(node.without(index)), specials):
                return self._least(node.without(index), specials)
        return node, self._needed(node, judgement, specials)

    def _report(self, node: Node, specials: list[Suspicion]) -> None:
        ordered: list[tuple[float, str, dict[str, Any]]] = []
        before, after = self._judge(Node()), self._judge(node)
        self.diagnosis.put_right = after is not None and not (
            after.kinds() & {"gradients", "applied"}
        )
        for index, (suspicion, variant) in enumerate(node.parts):
            rest = self._judge(node.without(index))
            size = _size(rest) if rest is not None else 0.0
            done: dict[str, Any] = {
                "put_right": [each.name for each in variant],
                "relative_before": self._before(before, specials) if before is not None else None,
                "relative_after": self._remaining(node, after, specials),
            }
            log = after.first("logged") if after is not None else None
            # What the loop logs is its own arithmetic, which no intervention touches.
            if log is not None and not any("logged" in each.explains for each in specials):
                done["logged_after"] = log.relative
            evidence = {**suspicion.evidence, "intervention": done}
            ordered.append((size, suspicion.code, cause(suspicion, "proved", evidence)))
        for suspicion in specials:
            own = [
                f.relative
                for f in (before.findings if before else [])
                # A logged loss that is not finite is not larger than any wrong gradient.
                if f.kind in suspicion.explains and math.isfinite(f.relative)
            ]
            ordered.append(
                (
                    max(own, default=0.0),
                    suspicion.code,
                    cause(suspicion, "proved", suspicion.evidence),
                )
            )
        ordered.sort(key=lambda item: (-item[0], item[1]))
        self.diagnosis.causes = [entry for *_, entry in ordered]

    def _unproved(self) -> None:
        """Nothing was proved: name what could not be tested, and list what was ruled out."""
        before = self._judge(Node())
        size = _size(before) if before is not None else 0.0
        seen: set[str] = set()
        for each in self._suspicions(Node()):
            if each.code in seen or each.is_guess:
                continue
            results = [self._judge(Node(((each, variant),))) for variant in each.variants]
            helped = any(
                r is not None
                and (_size(r) < size / 2 or len(r.kinds()) < len(before.kinds() if before else ()))
                for r in results
            )
            alone = not each.variants or not self._experiment.intervenes
            if helped or alone or each.is_seen:
                seen.add(each.code)
                self.diagnosis.causes.append(cause(each, "suspected", each.evidence))
            else:
                self.diagnosis.ruled_out.append(each.code)
        if not self.diagnosis.causes:
            step = before.findings[0].matched if before is not None and before.findings else 0
            evidence = {"ruled_out": sorted(set(self.diagnosis.ruled_out))}
            self.diagnosis.causes = [
                cause(Suspicion("EQ000", step=max(step, 0)), "suspected", evidence)
            ]


def _alike(one: Judgement, other: Judgement) -> bool:
    """Return whether two runs differ from the reference in the same places by the same numbers."""
    return len(one.findings) == len(other.findings) and all(
        (a.kind, a.matched, a.names) == (b.kind, b.matched, b.names)
        and (a.relative == b.relative or math.isclose(a.relative, b.relative, rel_tol=1e-9))
        for a, b in zip(one.findings, other.findings, strict=True)
    )


def _size(judgement: Judgement) -> float:
    """Return one number for how much is left: the largest relative difference."""
    return _largest(judgement.findings)


def _largest(findings: Sequence[Finding]) -> float:
    return max((min(each.relative, 1e30) for each in findings), default=0.0)


def cause(suspicion: Suspicion, status: str, evidence: dict[str, Any]) -> dict[str, Any]:
    """Return the entry of a cause in the result."""
    entry = CAUSES[suspicion.code]
    evidence = dict(evidence)
    # A detector that knows better than the catalogue what it found says so.
    because, fix = evidence.pop("because", entry.because), evidence.pop("fix", entry.fix)
    if suspicion.shared:
        evidence = {**evidence, "shared": True}
    return {
        "code": suspicion.code,
        "name": entry.name,
        "status": status,
        "optimizer_step": suspicion.step,
        "evidence": evidence,
        "because": because,
        "fix": fix,
    }


def diagnose(experiment: Experiment) -> Diagnosis:
    """Return the causes of the divergence of an experiment, with proofs."""
    return Search(experiment).run()
