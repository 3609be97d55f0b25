"""What a case measured, step by step and tensor by tensor, reduced to a size that a report can carry.

Every difference is taken in float64 before anything is rounded: subtracting numbers that were rounded
for display shows nothing but that rounding. A *multiple* is a difference over the rounding noise of
the very tensor, so that 1 is noise, `noise.SAFETY` the limit, and a fault many decades above both.

Legend: S optimizer steps, P parameters, K micro-batches of a cycle.
"""

from __future__ import annotations

import base64
import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from equivcheck.counting import ADDED_UP
from equivcheck.differences import Sums
from equivcheck.experiment import Experiment
from equivcheck.fit import Attribution
from equivcheck.noise import SAFETY
from equivcheck.recording import Recording, Step
from equivcheck.timelines import timelines
from equivcheck.verdict import Judgement, Noise, overall, whole_log
from equivcheck.view import View

# Points of a line: more than a screen has pixels in half its width.
POINTS: Final = 512
# Parameters whose numbers are written out; the rest share CELLS, one byte each.
WRITTEN: Final = 64
CELLS: Final = 200_000
MODULES: Final = 64
STEPS_OF_WEIGHTS: Final = 32
# A byte of a cell: 1/12 decade from 10**-3 on, which spans the 20 decades from below noise to 1e17.
_PER_DECADE: Final = 12
_LEAST_DECADE: Final = -3
ABSENT, EXACT, LEAST, MOST, NOT_FINITE = 0, 1, 2, 254, 255

Which = Callable[[Step], dict[str, Sums]]
QUANTITIES: Final[dict[str, Which]] = {
    "gradients": lambda step: step.gradients,
    "parameters": lambda step: step.parameters,
    "buffers": lambda step: step.buffers,
    "optimizer_state": lambda step: step.state,
}


def write(experiment: Experiment, entry: dict[str, Any], judgement: Judgement) -> None:
    """Write `steps`, `modules`, `cells`, `timelines`, `precision_by_module` and `micro_batches` into a case."""
    reference, candidate = experiment.reference(), experiment.candidate()
    noise = experiment.noise()
    matched = _by_match(candidate)
    wanted = _chosen(reference, matched)
    entry["steps"] = _lines(experiment, reference, matched, noise, wanted)
    entry["modules"] = _modules(matched, noise, wanted)
    differs = not judgement.same
    if differs:
        entry["parameters_by_step"] = _written(matched, noise, wanted, judgement)
        entry["cells"] = _cells(matched, noise, wanted)
    entry["timelines"] = timelines(experiment, _first_bad(judgement), whole=differs)
    if experiment.has_native:
        entry["precision_by_module"] = _precision(experiment)
    entry["limit"] = SAFETY


def attributed(view: View, found: Sequence[Attribution], entry: dict[str, Any]) -> None:
    """Write the weights of every step that was fitted, and what the micro-batches of the first hold."""
    entry["attributions"] = [
        {
            "optimizer_step": each.matched,
            "reference_weights": each.v.values,
            "candidate_weights": each.w.values,
            "reference_residual": each.v.residual,
            "candidate_residual": each.w.residual,
        }
        for each in found[:STEPS_OF_WEIGHTS]
    ]
    cycle = view.cycle_of(found[0].matched)
    counts = {
        label: cycles[cycle] for label, cycles in view.counts().items() if cycle < len(cycles)
    }
    telling = {
        label: values
        for label, values in counts.items()
        if label == "rows" or (len(set(values)) > 1 and not label.endswith(ADDED_UP))
    }
    entry["micro_batches"] = {"optimizer_step": found[0].matched, "counts": telling}


def kind_of(name: str) -> str:
    """Return the module that a parameter belongs to, numbers of repeated blocks left out.

    `blocks.3.mlp.fc2.weight` and `blocks.7.mlp.fc2.bias` are both `blocks.*.mlp.fc2`: hundreds of
    rows become a few, and a faulty kind of layer stands out.
    """
    parts = name.split(".")[:-1] or [name]
    return ".".join("*" if part.isdigit() else part for part in parts)


def encode(multiples: Sequence[Sequence[float | None]]) -> str:
    """Return one byte per cell, row by row, as base64 of zlib: see `byte_of`."""
    flat = bytes(byte_of(value) for row in multiples for value in row)
    return base64.b64encode(zlib.compress(flat, 9)).decode("ascii")


def byte_of(multiple: float | None) -> int:
    """Return a multiple of the noise as a byte.

    0 is absent, 1 exactly equal, 255 not finite; else 12 steps per decade, 2 standing for 1e-3.
    """
    if multiple is None:
        return ABSENT
    if multiple == 0.0:
        return EXACT
    if not math.isfinite(multiple):
        return NOT_FINITE
    place = LEAST + round(_PER_DECADE * (math.log10(multiple) - _LEAST_DECADE))
    return min(max(place, LEAST), MOST)


# ---- lines -------------------------------------------------------------------------------------


def _by_match(recording: Recording) -> dict[int, Step]:
    return {step.matched: step for step in recording.steps if step.matched is not None}


def _chosen(reference: Recording, matched: Mapping[int, Step]) -> list[int]:
    """Return the steps to show: all, or of each run of steps the one that is farthest off."""
    count = len(reference.steps)
    if count <= POINTS:
        return list(range(count))

    def size(index: int) -> float:
        step = matched.get(index)
        found = overall(step.gradients).relative if step is not None else 0.0
        return found if math.isfinite(found) else math.inf

    edges = [round(i * count / POINTS) for i in range(POINTS + 1)]
    worst = {max(range(a, b), key=size) for a, b in itertools.pairwise(edges) if b > a}
    return sorted(worst | {0, count - 1})


def _lines(
    experiment: Experiment,
    reference: Recording,
    matched: Mapping[int, Step],
    noise: Noise,
    wanted: Sequence[int],
) -> dict[str, Any]:
    found: dict[str, Any] = {"optimizer_step": list(wanted), "of": len(reference.steps)}
    for name, which in QUANTITIES.items():
        sums = [overall(which(matched[i])) if i in matched else None for i in wanted]
        if not any(each is not None and each.count for each in sums):
            continue
        controls = [noise.total(i, which) for i in wanted]
        found[name] = {
            "relative": [_rounded(s.relative) if s is not None else None for s in sums],
            "control": [_rounded(control) for control in controls],
            "scale": [_rounded(s.scale) if s is not None else None for s in sums],
            "cosine": [_rounded(s.cosine, 12) if s is not None else None for s in sums],
        }
        if name == "gradients":
            found[name]["allowed"] = [
                _rounded(max(SAFETY * control, noise.floor())) for control in controls
            ]
            found[name]["full_batch_norm"] = [
                _rounded(s.reference_norm) if s is not None else None for s in sums
            ]
            found[name]["accumulated_norm"] = [
                _rounded(s.candidate_norm) if s is not None else None for s in sums
            ]
    found["learning_rates"] = _rates(reference, matched, wanted)
    found["losses"] = _losses(reference, experiment.candidate(), matched, wanted)
    return found


def _rates(
    reference: Recording, matched: Mapping[int, Step], wanted: Sequence[int]
) -> dict[str, Any]:
    """Return, per step, the rate of the group that is farthest off."""
    rows: list[tuple[float | None, float | None, float | None]] = []
    for index in wanted:
        theirs = reference.steps[index].learning_rates
        mine = matched[index].learning_rates if index in matched else []
        pairs = list(zip(theirs, mine, strict=False))
        if not pairs:
            rows.append((theirs[0] if theirs else None, None, None))
            continue
        a, b = max(pairs, key=lambda pair: _apart(*pair))
        rows.append((a, b, _apart(a, b)))
    return dict(
        zip(
            ("full_batch", "accumulated", "relative"),
            ([_rounded(row[i]) for row in rows] for i in range(3)),
            strict=True,
        )
    )


def _losses(
    reference: Recording,
    candidate: Recording,
    matched: Mapping[int, Step],
    wanted: Sequence[int],
) -> dict[str, Any] | None:
    """Return logged losses per step, or the sums of the roots of its backwards where none are logged."""
    a, b = reference.logged, whole_log(reference, candidate)
    if a is not None and b is not None and len(a) == len(b) == len(reference.steps):
        pairs = [(a[i], b[i]) for i in wanted]
        source = "logged"
    elif candidate.ranks:  # what one rank calls backward on is scaled for its way of reducing
        return None
    else:
        pairs = [
            (
                _roots(reference, reference.steps[i]),
                _roots(candidate, matched[i]) if i in matched else math.nan,
            )
            for i in wanted
        ]
        source = "backward roots"
    return {
        "full_batch": [_rounded(x) for x, _ in pairs],
        "accumulated": [_rounded(y) for _, y in pairs],
        "relative": [_rounded(_apart(x, y)) for x, y in pairs],
        "source": source,
    }


def _roots(recording: Recording, step: Step) -> float:
    return sum(b.loss for b in recording.backwards[step.first_backward : step.backwards])


def _apart(a: float, b: float) -> float:
    if a == b:
        return 0.0
    return abs(a - b) / abs(a) if a else math.inf


# ---- tensors -----------------------------------------------------------------------------------


def multiple_of(step: Step, noise: Noise, name: str) -> float | None:
    """Return how many times the noise of a gradient its difference is; None where there is none."""
    found = step.gradients.get(name)
    if found is None or step.matched is None:
        return None
    if not found.finite:
        return math.inf
    if found.difference_norm == 0.0:
        return 0.0
    limit = noise.limit(step.matched, QUANTITIES["gradients"], name, found.reference_norm)
    return SAFETY * found.difference_norm / limit if limit else math.inf


def _modules(
    matched: Mapping[int, Step], noise: Noise, wanted: Sequence[int]
) -> dict[str, Any] | None:
    """Return the gradients of each kind of module, step by step, worst first."""
    names: dict[str, list[str]] = {}
    for step in matched.values():
        for name in step.gradients:
            members = names.setdefault(kind_of(name), [])
            if name not in members:
                members.append(name)
    if not names:
        return None
    rows = [_module(kind, members, matched, noise, wanted) for kind, members in names.items()]
    rows.sort(key=lambda row: -max((x for x in row["multiple"] if x is not None), default=0.0))
    return {"optimizer_step": list(wanted), "rows": rows[:MODULES], "of": len(rows)}


def _module(
    kind: str,
    members: Sequence[str],
    matched: Mapping[int, Step],
    noise: Noise,
    wanted: Sequence[int],
) -> dict[str, Any]:
    which = QUANTITIES["gradients"]
    relative: list[float | None] = []
    multiple: list[float | None] = []
    whole = Sums()
    for index in wanted:
        step = matched.get(index)
        present = [n for n in members if step is not None and n in step.gradients]
        if step is None or not present:
            relative.append(None)
            multiple.append(None)
            continue
        total = overall({name: step.gradients[name] for name in present})
        whole = whole + total
        limit = math.hypot(
            *(noise.limit(index, which, n, step.gradients[n].reference_norm) for n in present)
        )
        difference = total.difference_norm
        relative.append(_rounded(total.relative))
        multiple.append(
            0.0
            if difference == 0.0
            else _rounded(SAFETY * difference / limit if limit else math.inf)
        )
    return {
        "name": kind,
        "parameters": len(members),
        "relative": relative,
        "multiple": multiple,
        "scale": _rounded(whole.scale),
        "cosine": _rounded(whole.cosine, 12),
    }


def _written(
    matched: Mapping[int, Step], noise: Noise, wanted: Sequence[int], judgement: Judgement
) -> dict[str, Any]:
    """Return the numbers of the worst parameters, step by step."""
    sizes: dict[str, float] = {}
    for index, step in matched.items():
        zero = judgement.zero.get(index, set())
        for name in step.gradients:
            found = multiple_of(step, noise, name)
            if found is not None and name not in zero:
                sizes[name] = max(sizes.get(name, 0.0), found)
    names = sorted(sizes, key=lambda name: -sizes[name])[:WRITTEN]
    rows = []
    for name in names:
        sums = [matched[i].gradients.get(name) if i in matched else None for i in wanted]
        rows.append(
            {
                "name": name,
                "relative": [None if s is None else _rounded(s.relative) for s in sums],
                "multiple": [
                    _rounded(multiple_of(matched[i], noise, name)) if i in matched else None
                    for i in wanted
                ],
            }
        )
    return {"optimizer_step": list(wanted), "rows": rows, "of": len(sizes)}


def _cells(
    matched: Mapping[int, Step], noise: Noise, wanted: Sequence[int]
) -> dict[str, Any] | None:
    """Return the multiples of all parameters, one byte per cell, the largest of each run of steps."""
    names = list(dict.fromkeys(name for step in matched.values() for name in step.gradients))
    if not names or not wanted:
        return None
    rows = names[: CELLS // 8]
    columns = min(len(wanted), max(8, CELLS // len(rows)))
    edges = [round(i * len(wanted) / columns) for i in range(columns + 1)]
    runs = [wanted[a:b] for a, b in itertools.pairwise(edges)]
    values = [
        [
            max(
                (
                    x
                    for i in run
                    if i in matched and (x := multiple_of(matched[i], noise, name)) is not None
                ),
                default=None,
            )
            for run in runs
        ]
        for name in rows
    ]
    return {
        "names": rows,
        "of": len(names),
        "optimizer_step": [run[0] for run in runs],
        "zlib_base64": encode(values),
        "meaning": "one byte per cell, row by row: 0 absent, 1 equal, 255 not finite, "
        "else 10**((byte - 2) / 12 - 3) times the noise",
    }


def _precision(experiment: Experiment) -> list[dict[str, Any]]:
    """Return, per kind of module, the error of both native runs against float64, all steps together."""
    runs = {
        "full_batch": experiment.native("native_reference"),
        "accumulated": experiment.native("native_candidate"),
    }
    found: dict[str, dict[str, Sums]] = {}
    for title, run in runs.items():
        for step in run.steps:
            if step.matched is None or step.skipped:
                continue
            for name, sums in step.gradients.items():
                if sums.finite:
                    row = found.setdefault(kind_of(name), {})
                    row[title] = row.get(title, Sums()) + sums
    rows: list[dict[str, Any]] = [
        {"name": kind}
        | {title: _rounded(sums[title].relative) if title in sums else None for title in runs}
        for kind, sums in found.items()
    ]
    rows.sort(key=lambda row: -(row["accumulated"] or 0.0))
    return rows[:MODULES]


def _first_bad(judgement: Judgement) -> int:
    return max(min((f.matched for f in judgement.findings if f.matched >= 0), default=0), 0)


def _rounded(value: float | None, digits: int = 6) -> float | None:
    """Return a number with as many digits as a reader can use; the differences are taken before."""
    if value is None or not math.isfinite(value):
        return value
    return float(f"{value:.{digits}g}")
