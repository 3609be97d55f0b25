"""The cases that are not decided: nothing was compared, runs differ by themselves, or noise hides all.

Each function writes the verdict, and why, into the case.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from equivcheck.describe import measure
from equivcheck.diagnose import cause
from equivcheck.errors import EquivcheckError, StepError
from equivcheck.experiment import Experiment, UnderTest
from equivcheck.feed import Data
from equivcheck.recording import Recording, Step
from equivcheck.split import named_tensors
from equivcheck.verdict import Judgement, finite_pairs, not_finite, overall
from equivcheck.view import Suspicion


def usable(reference: Recording, entry: dict[str, Any], subject: UnderTest, data: Data) -> bool:
    """Return whether the reference holds anything to compare with; else the case is `invalid`."""
    if not reference.steps:
        backwards = len(reference.backwards)
        invalid(
            entry,
            f"no-optimizer-step: the full batch made {backwards} backwards and 0 optimizer steps",
        )
        entry["expected"] = "at least one optimizer step"
        entry["because"] = (
            "only steps of torch.optim optimizers, of optax.apply_updates and of Keras' own are seen; "
            "nothing was compared"
        )
        entry["fix"] = "take an optimizer step after the last micro-batch of every cycle"
        if not backwards:
            entry["because"], entry["fix"] = subject.trained_nothing
        return False
    sizes = [s for step in reference.steps for s in step.sample.values() if s is not None]
    if not sizes or not any(bool(s.any()) for s in sizes):
        held = sum(len(names) for names in reference.optimizers.values())
        foreign = all(
            name.startswith("(train)") for names in reference.optimizers.values() for name in names
        )
        what = f"no-gradient: the optimizer holds {held} parameters and none ever had a gradient"
        invalid(entry, what)
        entry["because"] = (
            f"none of them is a parameter of the model that build() of {subject.target} returned"
            if foreign
            else "backward was not called, or the loss does not depend on them"
        )
        entry["expected"] = "a gradient for at least one parameter that the optimizer holds"
        entry["fix"] = "make the optimizer of the model that train is given: model.parameters()"
        return False
    bad = next((step for step in reference.steps if not step.finite), None)
    if bad is not None:
        invalid(
            entry,
            f"not-finite: gradients of optimizer_step {bad.index} are inf or nan in the full batch",
        )
        entry["not_finite"] = True
        entry["expected"] = "finite gradients in every optimizer step of the full batch"
        entry["because"], in_data = _source_of(bad, data)
        entry["fix"] = (
            "leave those rows out, or fill them: torch.nan_to_num"
            if in_data
            else "torch.autograd.set_detect_anomaly(True) in train names the operator"
        )
        return False
    return True


def trained(candidate: Recording, entry: dict[str, Any]) -> bool:
    """Return whether any step was handed a gradient other than zero, in either run; else the case is `invalid`.

    An optimizer of the user's own may take its gradients from elsewhere: only torch's are spoken of.
    """
    steps = [step for step in candidate.steps if step.matched is not None and not step.skipped]
    if not all(hasattr(torch.optim, step.optimizer.split("(")[0]) for step in steps):
        return True
    sums = [(overall(step.gradients), overall(step.applied)) for step in steps]
    if not sums or any(taken.rr or taken.dd for _, taken in sums) or not any(g.rr for g, _ in sums):
        return True
    times = f"{len(sums)} times of {len(sums)}"
    invalid(entry, f"no-update: the optimizer's gradients are all zero when it steps, {times}")
    entry["expected"] = "the gradients that the backwards left, at the step"
    entry["because"] = "they are cleared between the last backward and the step, in both runs"
    entry["fix"] = "optimizer.zero_grad() after optimizer.step()"
    return False


def _source_of(step: Step, data: Data) -> tuple[str, bool]:
    """Return where inf or nan comes from: a batch that holds it (then True), or the parameters that show it."""
    for index, batch in enumerate(data.batches):
        for path, tensor in named_tensors(batch):
            count = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
            if count:
                place = path or "its tensor"
                return f"batch {index} of batches() holds {count} inf or nan in {place}", True
    names = [
        n for n, s in step.sample.items() if s is not None and not bool(torch.isfinite(s).all())
    ]
    shown = f": {', '.join(names[:3])}" if names else ""
    finite = "every batch is finite; " if data.batches else ""
    return f"{finite}{len(names)} of {len(step.sample)} gradients are not{shown}", False


def not_finite_accumulated(entry: dict[str, Any], index: int) -> None:
    """Write a case whose accumulated run alone is not finite."""
    invalid(
        entry, f"not-finite: gradients of optimizer_step {index} are inf or nan when accumulated"
    )
    entry["expected"] = "finite gradients, as the full batch has"
    entry["because"] = (
        "the full batch is finite: a micro-batch alone is not, as a mean over no valid label is"
    )
    entry["fix"] = "sum(losses) / max(count of the whole cycle, 1)"


def invalid(entry: dict[str, Any], headline: str) -> None:
    """Write a case in which nothing was compared."""
    entry["verdict"] = "invalid"
    entry["headline"] = headline


def different_samples(experiment: Experiment, entry: dict[str, Any]) -> bool:
    """EQ601: a micro-batch mixed the samples of several of the reference's optimizer steps, or came out of order."""
    recognised = experiment.other_samples()
    if recognised is not None:
        if recognised:
            entry["causes"] = [
                cause(Suspicion("EQ601", step=recognised["optimizer_step"]), "proved", recognised)
            ]
            invalid(
                entry,
                f"EQ601 different-samples: other samples from optimizer_step {recognised['optimizer_step']} on",
            )
        return bool(recognised)
    candidate = experiment.candidate()
    evidence = _taken_twice(experiment, candidate)
    for each in candidate.ranks or [candidate]:
        evidence = evidence or _out_of_order(experiment, each)
    if not evidence:
        return False
    repeated = experiment.control(permuted=False)
    again = [step.samples for step in repeated.steps] == [
        step.samples for step in experiment.reference().steps
    ]
    evidence["repeat"] = (
        "the full batch takes the same samples again" if again else "each run takes other samples"
    )
    entry["causes"] = [cause(Suspicion("EQ601"), "proved", evidence)]
    invalid(
        entry, "EQ601 different-samples: the accumulated run took other samples per optimizer step"
    )
    return True


def _out_of_order(experiment: Experiment, taken: Recording) -> dict[str, Any]:
    """Return how the micro-batches of a process mix the reference's optimizer steps, or leave their order."""
    cycles = experiment.cycles()
    groups: list[set[int]] = []
    if experiment.reference().prefetched:
        # In the order in which they were used, not handed out.
        groups = [{cycles.get(key, -1) for key in taken.fetched[use]} for use in taken.uses]
    else:
        last_backwards, index = -1, 0
        for event in taken.timeline:
            if event.kind == "fetch":
                if event.backwards != last_backwards or not groups:
                    groups.append(set())
                last_backwards = event.backwards
                groups[-1] |= {cycles.get(key, -1) for key in taken.fetched[index]}
                index += 1
    # What no step of the full batch took has no place in its order.
    flat = [cycle for group in groups if len(group) == 1 for cycle in group - {-1}]
    one_by_one = "dataset" in experiment.wants
    mixed = one_by_one and any(len(group - {-1}) > 1 for group in groups)
    disordered = flat != sorted(flat)
    unknown = one_by_one and any(group == {-1} for group in groups)
    if not (mixed or disordered or unknown):
        return {}
    return {"micro_batches_that_mix_optimizer_steps": sum(len(group) > 1 for group in groups)}


def _taken_twice(experiment: Experiment, candidate: Recording) -> dict[str, Any]:
    """Return which samples several ranks took in an optimizer step that is none of the full batch's.

    Ranks that compute one batch together may all take the whole of it: their step is the full batch's.
    """
    if "dataset" not in experiment.wants or experiment.case.shares == 1:
        return {}
    for step in candidate.steps:
        if step.matched is not None:
            continue
        taken = Counter(
            key
            for each in candidate.ranks
            if step.index < len(each.steps)
            for key in each.steps[step.index].samples
        )
        twice = sum(count > 1 for count in taken.values())
        if twice:
            return {
                "optimizer_step": step.index,
                "samples_of_several_ranks": f"{twice} of {len(taken)}",
                "because": "ranks draw from the whole data set, each for itself: some take what others take too",
                "fix": "DistributedSampler(dataset, num_replicas=world_size, rank=rank), with one seed on all ranks",
            }
    return {}


def inconclusive(experiment: Experiment, entry: dict[str, Any], off: float) -> None:
    """The control differs from the reference: find out why, by repeats."""
    repeat = experiment.control(permuted=False)
    bitwise = _identical(repeat)
    entry["verdict"] = "inconclusive"
    shown = f"{off:.1e}" if math.isfinite(off) else "which are not finite"
    differing = (
        f"two full_batch runs differ by {off:.1e}"
        if math.isfinite(off)
        else "of two full_batch runs only one is finite"
    )
    if not bitwise and not experiment.subject.repeatable:
        _state_survives(experiment, entry, None, differing)
        return
    first, again = len(experiment.reference().steps), len(repeat.steps)
    if again < first:
        entry["headline"] = (
            f"other-steps: the full_batch run again made {again} optimizer steps, not {first}"
        )
        entry["because"] = (
            "it found something that the first run left behind: a checkpoint that it resumes from, a cache, a lock"
        )
        entry["fix"] = "let every run start anew: a folder of its own, or nothing to resume from"
        return
    if bitwise:
        reseeded = experiment.control(permuted=False, seed_offset=1)
        if not _identical(reseeded):
            suspicion = Suspicion(
                "EQ602", evidence={"relative": off, "repeat": "differs with another seed"}
            )
        else:
            entry["headline"] = (
                f"order-dependent: rows in another order give other gradients, {shown}"
            )
            entry["because"] = (
                "bitwise equal when repeated in order: the code treats a row by its place in the batch"
            )
            entry["fix"] = (
                "rows that belong together next to each other, and cuts that do not part them: --split even, another K"
            )
            measure(experiment, entry, experiment.judgement())
            return
    else:
        drawn = (
            repeat.random_drawn
            or experiment.reference().random_drawn
            or experiment.reference().unseeded
        )
        code = "EQ602" if drawn else "EQ603"
        suspicion = Suspicion(
            code, evidence={"relative": off, "repeat": "the same full batch gives other gradients"}
        )
    entry["causes"] = [cause(suspicion, "proved", suspicion.evidence)]
    entry["headline"] = f"{suspicion.code} {entry['causes'][0]['name']}: {differing}"


def differs_from_itself(
    experiment: Experiment, entry: dict[str, Any], judgement: Judgement
) -> bool:
    """Run the candidate once more at the end, where the code cannot be executed anew; write the case if it differs."""
    difference = None if experiment.subject.repeatable else _again(experiment)
    if difference is None:
        return False
    _state_survives(
        experiment, entry, judgement, f"the accumulated run differs from itself, {difference}"
    )
    return True


def _again(experiment: Experiment) -> str | None:
    """Return what differs between a second accumulated run and the first, or None."""
    first, second = experiment.candidate(), experiment.candidate_again()
    limit = experiment.noise().floor()
    if [step.samples for step in first.steps] != [step.samples for step in second.steps]:
        return "it steps after other samples"
    for a, b in zip(first.steps, second.steps, strict=True):
        for kind in ("gradients", "applied", "parameters", "state", "buffers"):
            x, y = overall(getattr(a, kind)), overall(getattr(b, kind))
            # Both runs are measured against the same reference, by their parts along it and in all.
            if max(abs(x.rd - y.rd), abs(x.dd - y.dd)) > limit * x.rr:
                return f"{kind} of optimizer_step {a.index}"
        if a.learning_rates != b.learning_rates:
            return f"learning rates of optimizer_step {a.index}"
    a_log, b_log = first.logged, second.logged
    if a_log is None or b_log is None:
        return None
    same = (
        len(a_log) == len(b_log)
        and not_finite(a_log, b_log) is None
        and all(x == y for x, y in finite_pairs(a_log, b_log))
    )
    return None if same else "logged losses"


def _state_survives(
    experiment: Experiment, entry: dict[str, Any], judgement: Judgement | None, difference: str
) -> None:
    """An object's code cannot be executed anew for every run, and its runs differ."""
    if judgement is not None:
        measure(experiment, entry, judgement)
    entry["verdict"] = "inconclusive"
    entry["headline"] = f"state-survives: {difference}"
    entry["because"] = (
        f"{experiment.subject.target} is an object, which cannot be executed again: state survives between runs, "
        "or a random generator of its own does"
    )
    entry["fix"] = (
        "check it as a file, FILE.py or package.module: those are executed anew for every run"
    )


def _identical(recording: Recording) -> bool:
    return all(s.dd == 0.0 for step in recording.steps for s in step.gradients.values()) and all(
        step.matched is not None for step in recording.steps
    )


def too_coarse(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> None:
    """The runs as written agree, in noise so large that any fault would have agreed too."""
    measure(experiment, entry, judgement)
    entry["verdict"] = "inconclusive"
    entry["headline"] = f"too-coarse: as written, faults below {judgement.power:.1e} cannot be seen"
    entry["because"] = (
        "the case could not be judged in float64, and in its own precision the noise is as large"
    )
    entry["fix"] = "let train run in float64: no asserted dtype, no dtype taken for granted"


def draws(experiment: Experiment, judgement: Judgement) -> float | None:
    """Return how far the full batch differs with other seeds, if that may be all that was found.

    EQ602 that a permutation does not show: one draw for all rows of a forward, more draws when accumulated.

    The full batch is repeated with other seeds, those that the loop sets itself included. What a loop draws before its
    first step (weights, say) is no random step: from the second step on every role starts from the reference's state.
    """
    if not judgement.kinds() & {"gradients", "applied"}:
        return None
    try:
        reseeded = experiment.control(permuted=False, seed_offset=1)
    except StepError:
        return None
    steps = [step for step in reseeded.steps if step.matched is not None]
    if len(experiment.reference().steps) > 1 and not experiment.reseeds_forwards:
        steps = [step for step in steps if step.matched]
    worst = max((overall(step.gradients).relative for step in steps), default=0.0)
    return worst if worst > _allowed(judgement) else None


def _allowed(judgement: Judgement) -> float:
    """Return what gradients may differ by in right code, of those that differ."""
    return max(
        (each.allowed for each in judgement.findings if each.kind in {"gradients", "applied"}),
        default=0.0,
    )


def draws_within(experiment: Experiment, judgement: Judgement) -> bool:
    """Return whether steps draw: what a loop draws before its first micro-batch is the same in both runs.

    A queue of negatives, a fixed projection, a teacher's weights.
    """
    try:
        reseeded = experiment.reseeded_within()
    except EquivcheckError:
        return True
    return any(
        overall(step.gradients).relative > _allowed(judgement)
        for step in reseeded.steps
        if step.matched is not None
    )


def stochastic(
    experiment: Experiment, entry: dict[str, Any], judgement: Judgement, worst: float
) -> None:
    """Write a case whose full batch differs with other seeds, by `worst`."""
    suspicion = Suspicion(
        "EQ602", evidence={"relative": worst, "repeat": "the full batch differs with another seed"}
    )
    entry["causes"] = [cause(suspicion, "proved", suspicion.evidence)]
    entry["verdict"] = "inconclusive"
    entry["headline"] = (
        f"EQ602 stochastic-step: with another seed two full_batch runs differ by {worst:.1e}"
    )
    measure(experiment, entry, judgement)
