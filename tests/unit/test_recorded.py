"""Two recordings compared: what is told of them, and what a recording that cannot be run again refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equivcheck.attach.store import Facts, save
from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.recording import Backward, Event, Recording, Step
from equivcheck.scripts.recorded import Recorded, RecordedExperiment, compare_recordings

ROWS, STEPS, WIDTH = 4, 3, 5
RATE = 0.1
DATA = torch.randn(
    STEPS, ROWS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
)


def record(
    folder, k=1, *, factor=1.0, noise=0.0, first=0, steps=STEPS, seen=True, world_size=1, **facts
):
    """Write what `equivcheck record` writes of gradient descent on the mean square of a product.

    Args:
        folder: Where to.
        k: Micro-batches per optimizer step.
        factor: That the loop multiplies its loss by.
        noise: Relative error of every gradient.
        first: Number of the first row that it uses.
        steps: Optimizer steps; those beyond the data start it anew.
        seen: Whether samples were, by what enters a module.
        world_size: Ranks that there were; the first alone is written.
        facts: What else is known of it; `sample` and `dropout` are of the recording.
    """
    of_recording = {name: facts.pop(name) for name in ("sample", "dropout") if name in facts}
    weight = torch.ones(WIDTH, dtype=torch.float64)
    recording = Recording(
        "watched", dropout=of_recording.get("dropout", False), optimizers={"SGD": ["w"]}
    )
    known = Facts(
        **{
            "world_size": world_size,
            "ended": "exit",
            "promoted": True,
            "command": ["a.py"],
            **facts,
        }
    )
    known.after = []
    for index in range(steps):
        total = torch.zeros_like(weight)
        for micro, rows in enumerate(DATA[index % STEPS].chunk(k)):
            begin = first + index * ROWS + micro * len(rows)
            if seen:
                recording.fetched.append([(0, begin + i) for i in range(len(rows))])
                known.digests += [(begin + i + 1, begin + i + 1) for i in range(len(rows))]
                known.counts.append({"rows": len(rows)})
            count = len(recording.backwards)
            recording.timeline += [
                Event("fetch", count, count),
                Event("backward", count, count + 1),
            ]
            loss = float((rows @ weight).square().mean()) / k * factor
            recording.backwards.append(Backward(count, count + 1, loss, 1.0, "MeanBackward0"))
            added = 2 * rows.T @ (rows @ weight) / len(rows) / k * factor
            known.contributions.append({"w": added})
            total += added
        total = total * (1 + noise)
        weight = weight - RATE * total
        count = len(recording.backwards)
        recording.timeline.append(Event("step", count, count))
        keys = frozenset(key for keys in recording.fetched[-k:] for key in keys)
        step = Step(index, "SGD", keys, count, count - k, [RATE], norm=float(total.norm()))
        step.sample = of_recording.get("sample") or {"w": total}
        recording.steps.append(step)
        known.after.append({"w": weight})
    if known.ended == "exception":
        known.after.pop()
    (folder / "rank-0").mkdir(parents=True)
    save(folder / "rank-0", recording, known)
    return str(folder)


def told(case):
    return case["verdict"], [f"{each['code']} {each['status']}" for each in case["causes"]]


def test_the_same_training_in_micro_batches_is_equivalent(tmp_path):
    case = compare_recordings(record(tmp_path / "full"), record(tmp_path / "accumulated", 2))

    assert told(case) == ("equivalent", []), case["headline"]
    assert (case["accumulation_steps"], case["world_size"]) == (2, 1)
    assert any("--control takes a second recording" in note for note in case["notes"])
    assert "3 of 3 optimizer steps compared" in case["notes"]


def test_a_fault_is_suspected_and_the_command_that_proves_it_is_named(tmp_path):
    """Later steps start from other parameters, so that they say nothing."""
    full = record(tmp_path / "full", launched="python a.py --accum 1")
    faulty = record(tmp_path / "faulty", 2, factor=2.0)
    case = compare_recordings(full, faulty, expect=["EQ101"])

    assert told(case) == ("divergent", ["EQ101 suspected"]), case["headline"]
    assert case["divergence"]["gradients"]["scale"] == pytest.approx(2.0)
    assert "later optimizer steps start from other parameters: not compared" in case["notes"]
    assert case["replay"] == f"equivcheck compare {full} {faulty} --expect EQ101"
    proof = "equivcheck run --full 'python a.py --accum 1' --accumulated a.py"
    assert f"nothing was run again; to prove a cause: {proof}" in case["notes"]


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_a_control_says_what_is_noise(tmp_path, noise):
    """A difference of the size of the control's is none; without that much noise it is one."""
    full = record(tmp_path / "full")
    control = record(tmp_path / "control", noise=noise)
    accumulated = record(tmp_path / "accumulated", 2, noise=-1e-6)
    case = compare_recordings(full, accumulated, control)

    assert case["verdict"] == ("equivalent" if noise else "divergent"), case["headline"]
    assert case["replay"] == f"equivcheck compare {full} {accumulated} --control {control}"
    assert not any("--control" in note for note in case["notes"])


def test_recordings_as_written_are_judged_by_their_own_precision(tmp_path):
    """What rounding in float32 may do is no difference there, and one in float64."""
    folders = [
        [
            record(tmp_path / f"full-{promoted}", promoted=promoted),
            record(tmp_path / f"accumulated-{promoted}", 2, noise=1e-8, promoted=promoted),
        ]
        for promoted in (True, False)
    ]
    in_float64, as_written = (compare_recordings(*each) for each in folders)

    assert in_float64["verdict"] == "divergent"
    assert "judged" not in in_float64
    assert as_written["verdict"] == "equivalent", as_written["headline"]
    assert as_written["judged"] == "native"


def test_a_dropout_that_was_switched_off_is_said(tmp_path):
    full, without = record(tmp_path / "full"), record(tmp_path / "without", 2, dropout=True)

    assert f"dropout was switched off in {without}" in compare_recordings(full, without)["notes"]


def test_noise_as_large_as_any_fault_decides_nothing(tmp_path):
    full, control = record(tmp_path / "full"), record(tmp_path / "control", noise=3.0)
    case = compare_recordings(full, record(tmp_path / "accumulated", 2, factor=3.0), control)

    assert case["verdict"] == "inconclusive"
    assert case["headline"].startswith("too-coarse")


@pytest.mark.parametrize("control", [None, {}, {"first": ROWS}], ids=["none", "same", "other"])
def test_recordings_of_other_samples_are_not_compared(tmp_path, control):
    """Whatever a control took: these two cannot be compared."""
    full, other = record(tmp_path / "full"), record(tmp_path / "other", 2, first=ROWS)
    third = None if control is None else record(tmp_path / "control", **control)
    case = compare_recordings(full, other, third)

    assert told(case) == ("invalid", ["EQ601 proved"]), case["headline"]


def test_a_recording_without_a_gradient_is_invalid(tmp_path):
    full = record(tmp_path / "full", sample={"w": None})
    case = compare_recordings(full, record(tmp_path / "accumulated", 2))

    assert case["verdict"] == "invalid"
    assert case["headline"].startswith("no-gradient")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (None, "no-recording"),
        ({"world_size": 2}, "missing-ranks: .* has 1 ranks of 2"),
        (
            {"sample": {"w": torch.ones(WIDTH + 1)}},
            "other-shapes: w has 6 sampled gradients, not 5",
        ),
    ],
    ids=["no recording", "a rank is missing", "another model"],
)
def test_recordings_that_cannot_be_compared_are_refused(tmp_path, fields, message):
    full, other = record(tmp_path / "full"), tmp_path / "other"
    if fields is not None:
        record(other, 2, **fields)

    with pytest.raises(UsageError, match=message):
        compare_recordings(full, str(other))


def laboratory(full, accumulated):
    """Return the experiment of two recordings."""
    recorded = [Recorded(Path(each)) for each in (full, accumulated)]
    return RecordedExperiment(*recorded, None, Case("full | accumulated", 1))


def test_micro_batches_that_the_full_batch_never_used_have_no_place(tmp_path):
    """The accumulated run went on for longer: its last step has no weights, and counts nowhere."""
    lab = laboratory(record(tmp_path / "full"), record(tmp_path / "longer", 2, steps=STEPS + 1))

    assert [step.matched for step in lab.candidate().steps] == [0, 1, 2, None]
    assert [each.step for each in lab.attributions()] == [0, 1, 2]
    assert lab.counts(2) == {"rows": [[2, 2]] * STEPS}
    assert lab.micro_batches(lab.data) == [[i, i + 1] for i in range(0, STEPS * ROWS, 2)]


def test_without_samples_steps_are_matched_in_order_and_have_no_weights(tmp_path):
    """A loop that calls no module, a function of parameters: backwards tell how many there are to a step."""
    full = record(tmp_path / "full", seen=False)
    right = record(tmp_path / "accumulated", 2, seen=False)
    faulty = laboratory(full, record(tmp_path / "faulty", 2, seen=False, factor=2.0))

    assert told(compare_recordings(full, right)) == ("equivalent", [])
    assert faulty.case.accumulation_steps == 2
    assert not faulty.judgement().same
    assert faulty.attributions() == []


@pytest.mark.parametrize("seen", [True, False])
def test_an_accumulated_run_without_optimizer_steps_is_not_equivalent(tmp_path, seen):
    full = record(tmp_path / "full", seen=seen)
    case = compare_recordings(full, record(tmp_path / "accumulated", 2, steps=0, seen=seen))

    assert case["verdict"] == ("invalid" if seen else "divergent")


def test_the_step_in_which_a_script_raised_has_no_parameters_to_compare(tmp_path):
    """It was seen when it began; what the gradients were is known, and what became of them is not."""
    full = record(tmp_path / "full")
    lab = laboratory(full, record(tmp_path / "accumulated", 2, ended="exception"))

    assert [sorted(step.gradients) for step in lab.candidate().steps] == [["w"]] * STEPS
    assert [sorted(step.parameters) for step in lab.candidate().steps] == [["w"], ["w"], []]
    assert lab.judgement().same


def test_nothing_of_a_recording_can_be_run_again(tmp_path):
    lab = laboratory(record(tmp_path / "full"), record(tmp_path / "accumulated", 2))
    with pytest.raises(UsageError, match="cannot be run again: full_batch"):
        lab.reference_of_length(7)
    with pytest.raises(UsageError, match="cannot be run again: pieces"):
        lab.pieces_recording(("reweight",))
    with pytest.raises(UsageError, match="cannot be run again"):
        lab.judgement(("reweight",))

    assert lab.pieces_recording() is lab.candidate()
    assert lab.printed() is None
    assert lab.control().steps == []
    lab.close()
    assert Path(tmp_path / "full" / "rank-0").exists()
