"""What is made of the processes of a command line, and what is refused: without starting any."""

from __future__ import annotations

import signal
import sys

import pytest
import torch

from equivcheck.attach import store
from equivcheck.attach.launch import Ended
from equivcheck.attach.process import ATTACHED
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import Facts
from equivcheck.case import Case
from equivcheck.errors import InternalError, StepError, UsageError
from equivcheck.feed import Data
from equivcheck.interventions import Length, Shorten
from equivcheck.recording import Backward, Recording, Step
from equivcheck.scripts import runner
from equivcheck.scripts.experiment import ScriptExperiment
from equivcheck.scripts.merge import together
from equivcheck.scripts.pieces import addends_of, attribution_of, pieces_of
from equivcheck.scripts.printed import Number, differing
from equivcheck.scripts.runner import Runner
from equivcheck.scripts.samples import first_difference
from equivcheck.scripts.target import Command, Script, script_of, scripts_of


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def step(index, *numbers, sample=None):
    """Return an optimizer step that consumed the samples of these numbers."""
    found = Step(index, "SGD", frozenset((0, n) for n in numbers), index + 1, index, [0.1])
    found.matched, found.sample = index, {"w": vector(3.0, 4.0) if sample is None else sample}
    return found


def fetched(*micro_batches):
    """Return a recording that took micro-batches of these samples, with a backward for each."""
    keys = [[(0, n) for n in each] for each in micro_batches]
    backwards = [Backward(i, i + 1, 1.0, 1.0, "MeanBackward0") for i in range(len(keys))]
    return Recording("candidate", fetched=keys, backwards=backwards)


@pytest.fixture
def leaving(monkeypatch):
    """Return a function that lets every command line end at once, as if its processes had left these files.

    What it returns is filled with what each of them was asked.
    """

    def prepare(ranks=None, *, code=0, failures=(), attached=True):
        asked = []

        def launch(_words, spec, folder, **_):
            asked.append(spec)
            folder.mkdir(parents=True)
            if attached:
                (folder / ATTACHED).touch()
            for name, facts in (ranks or {}).items():
                (folder / "ranks" / name).mkdir(parents=True)
                store.save(folder / "ranks" / name, Recording("reference", [step(0, 0)]), facts)
            return Ended(code, "the disk is full", list(failures), 0.1)

        monkeypatch.setattr(runner, "launch", launch)
        return asked

    return prepare


COMMAND = Command("python a.py", ("python", "a.py"))


@pytest.fixture
def run(leaving):
    """Return a function that reads what a command line's processes left, and the notes that were taken."""

    def runs(ranks=None, **how):
        notes = []
        ours = Runner(lambda _: None, notes.append)
        leaving(ranks, **how)
        try:
            recording, _ = ours.run(Spec("reference", "", "write"), COMMAND, None, None)
        finally:
            ours.close()
        return recording, notes

    return runs


@pytest.fixture
def laboratory():
    """Return the experiment of two command lines."""
    lab = ScriptExperiment(Script(COMMAND, COMMAND), Case("python a.py | python a.py", 1))
    yield lab
    lab.close()


def test_a_note_on_a_command_is_taken_once(leaving, laboratory):
    """Every role runs it, and says the same."""
    leaving({"rank-0": Facts(ended="exit"), "rank-0.1": Facts(ended="exit")})
    laboratory.reference()
    laboratory.control()

    assert laboratory.notes == ["python a.py: a second training process of one rank was left out"]


def test_a_script_learns_the_number_of_its_steps_from_its_loader(leaving, laboratory):
    asked = leaving({"rank-0": Facts(ended="exit")})
    laboratory.reference_of_horizon(5)

    assert [(spec.role, spec.length) for spec in asked] == [("reference", None), ("full_batch", 5)]


def test_a_script_is_told_the_length_that_is_put_right(laboratory, monkeypatch):
    asked = []

    def run(spec, *_):
        asked.append(spec.length)
        return Recording("candidate"), Ended(0, "", [], 0.1)

    monkeypatch.setattr(laboratory._runner, "run", run)
    laboratory._run("candidate", COMMAND, "write", interventions=(Length(7),))
    laboratory._run("candidate", COMMAND, "write")

    assert asked == [7, None]


def test_without_the_tail_the_last_full_batch_of_a_script_is_none(laboratory, monkeypatch):
    monkeypatch.setattr(ScriptExperiment, "data", Data([None] * 3, [8, 8, 4]))

    assert laboratory.data_for((), promoted=True).rows == [8, 8, 4]
    assert laboratory.data_for((Shorten(),), promoted=True).rows == [8, 8]


def test_the_control_of_a_script_is_perturbed_already(leaving, laboratory):
    asked = leaving({"rank-0": Facts(ended="exit")})

    assert laboratory.perturbed() is laboratory.control()
    assert [spec.observer for spec in asked] == ["write", "perturb"]


def test_a_command_without_processes_leaves_an_empty_reference(leaving, laboratory):
    leaving()

    assert laboratory.reference().steps == []
    assert laboratory.facts()["full_command"] == "python a.py"


def test_a_full_batch_on_several_ranks_is_one_recording(run):
    """Each process says which of them it was."""
    both = {f"rank-{rank}": Facts(ended="exit", rank=rank, world_size=2) for rank in range(2)}
    recording, _ = run(both)

    assert [len(each.steps) for each in (recording, *recording.ranks)] == [1, 1, 1]


def test_a_second_process_of_one_rank_is_left_out_and_said(run):
    """A script that evaluates in a child, say."""
    recording, notes = run({"rank-0": Facts(ended="exit"), "rank-0.1": Facts(ended="exit")})

    assert len(recording.steps) == 1
    assert notes == ["python a.py: a second training process of one rank was left out"]


@pytest.mark.parametrize("attached", [True, False])
def test_a_command_that_trains_nothing_has_no_steps(run, attached):
    """It is said where Python was told to ignore its environment: nothing could be seen there."""
    recording, notes = run(attached=attached)

    assert recording.steps == []
    assert [" could be watched: " in note for note in notes] == ([] if attached else [True])


def test_an_abort_behind_the_end_of_a_script_is_none_of_its_faults(run):
    """A destructor of a communication library, say: everything had been seen."""
    recording, notes = run({"rank-0": Facts(ended="exit")}, code=128 + signal.SIGABRT)

    assert len(recording.steps) == 1
    assert notes == ["reference: the command aborted when everything had been seen (134)"]


@pytest.mark.parametrize(
    ("facts", "code", "told"),
    [
        (Facts(ended="running"), -signal.SIGABRT, "exit code -6"),
        (Facts(ended="exit"), 1, "exit code 1"),
        (Facts(ended="exception", error="KeyError: 'x'\nmore"), 1, "KeyError: 'x'"),
    ],
    ids=["an abort before the end", "an exit code", "an exception"],
)
def test_a_command_that_fails_is_an_error_of_the_script(run, facts, code, told):
    with pytest.raises(StepError, match=f"script-raised: {told}"):
        run({"rank-0": facts}, code=code)


def test_a_process_that_was_killed_behind_the_back_of_its_command_is_refused(run):
    with pytest.raises(UsageError, match="recording-cut-short: rank-0 of reference ends after"):
        run({"rank-0": Facts(ended="running")})


def test_a_recorder_that_could_not_be_put_in_place_is_our_fault(run):
    with pytest.raises(InternalError, match="no module named equivcheck"):
        run(failures=["no module named equivcheck"])


def test_ranks_of_the_full_batch_are_one_batch():
    """As many steps and micro-batches as all ranks have."""
    ranks = [fetched([0], [2], [4]), fetched([1], [3])]
    ranks[0].steps, ranks[1].steps = [step(0, 0), step(1, 2), step(2, 4)], [step(0, 1), step(1, 3)]
    whole = together(ranks)

    assert whole.fetched == [[(0, 0), (0, 1)], [(0, 2), (0, 3)]]
    assert [each.samples for each in whole.steps] == [{(0, 0), (0, 1)}, {(0, 2), (0, 3)}]
    assert whole.ranks == ranks
    assert together(ranks[:1]) is ranks[0]


FULL = [step(0, 0, 1, 2, 3), step(1, 4, 5, 6, 7), step(2, 8, 9)]
CYCLES = {(0, n): n // 4 for n in range(10)}


@pytest.mark.parametrize(
    ("micro_batches", "expected"),
    [
        (([0, 1], [2, 3], [4, 5], [6, 7], [8, 9]), {}),
        (([0, 1], [2, 3], [4, 5], [6, 7]), {}),
        (([0, 1], [2, 3], [4, 5]), {"optimizer_step": 1, "not_used_by_the_accumulated_run": 2}),
        (([0, 1], [2, 4], [3, 5], [6, 7]), {"optimizer_step": 0, "micro_batch": 1}),
        (([0, 1], [4, 5], [2, 3], [6, 7]), {"optimizer_step": 0, "micro_batch": 2}),
        (
            ([0, 1], [2, 3], [40, 41]),
            {"optimizer_step": 0, "micro_batch": 2, "never_used_by_the_full_batch": 2},
        ),
    ],
    ids=["same", "no tail", "left out", "mixed", "out of order", "unknown"],
)
def test_it_is_told_where_the_samples_part(micro_batches, expected):
    """Whole optimizer steps may be left out at an incomplete end; anything else is named with its place."""
    found = first_difference(FULL, fetched(*micro_batches), CYCLES, tail={8, 9})

    assert found.items() >= expected.items()
    assert bool(found) == bool(expected)


@pytest.mark.parametrize(
    ("printed", "rule"),
    [
        (3.0, "the last backward's loss"),
        (12.0, "the last backward's loss, times accumulation_steps"),
        (2.5, None),
    ],
)
def test_a_printed_loss_of_the_last_micro_batch_is_recognised(printed, rule):
    """The full batch prints 2.0 at its only step, the accumulated run had losses of 1.0 and 3.0 there."""
    candidate = fetched([0], [1])
    candidate.backwards[1].loss = 3.0
    candidate.steps = [step(0, 0, 1)]
    candidate.steps[0].backwards, candidate.steps[0].first_backward = 2, 0
    found = differing(
        {"loss": [Number(2.0, 1e-4)]}, {"loss": [Number(printed, 1e-4)]}, candidate, 1, 4
    )

    assert found is not None
    assert (found.get("rule"), found["exact"]) == (rule, False)


def test_a_piece_is_what_a_micro_batch_adds_without_the_loss_scale():
    """Several backwards of one micro-batch add up; samples that the full batch never used have no place."""
    alone = fetched([0], [1], [40])
    alone.backwards = [
        Backward(index, fetches, 1.0, scale, "MulBackward0", owner=fetches - 1)
        for index, (fetches, scale) in enumerate([(1, 2.0), (1, 2.0), (2, 4.0), (3, 1.0)])
    ]
    added = [{"w": vector(x, 0.0)} for x in (2.0, 4.0, 4.0, 9.0)]
    [found] = pieces_of(alone, [Facts(contributions=added)], CYCLES).values()

    assert [each["w"].tolist() for each in found] == [[3.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("second", "is_sum", "weights"),
    [
        (vector(0.0, 4.0), False, [0.5, 0.5]),
        (vector(0.0, 4.0), True, [1.0, 1.0]),
        (vector(-3.0, -4.0), False, None),
    ],
    ids=["a mean", "a sum", "no scale makes a mean of them"],
)
def test_pieces_are_scaled_so_that_the_full_batch_has_weights_of_a_mean(second, is_sum, weights):
    """A command line shows what backwards add, and so ratios only; those of a mean add up to 1, of a sum to K."""
    pieces = [{"w": vector(3.0, 0.0)}, {"w": second}]
    if weights is None:
        pieces[0] = {"w": -second}
    target = step(0, 0, 1, sample=vector(3.0, 4.0) if weights else vector(4.0, -3.0))
    found = attribution_of(step(0, 0, 1), target, pieces, None, is_sum=is_sum)

    if weights is None:
        assert torch.equal(found.pieces, torch.stack([each["w"] for each in pieces]))
    else:
        assert found.v.solution == pytest.approx(weights)


def test_addends_alone_are_scaled_as_the_full_batch_has_them():
    """A main loss like a mean, a penalty once; what some micro-batches lack, or a factor of 0, leaves one alone."""
    main, penalty, partial, against = ((0, (n,)) for n in range(4))
    alone = {
        (0, 0): {
            main: {"w": vector(1.0, 0.0)},
            penalty: {"w": vector(2.0, 2.0)},
            partial: {"w": vector(1.0, 1.0)},
            against: {"w": vector(1.0, 0.0)},
        },
        (0, 1): {
            main: {"w": vector(0.0, 1.0)},
            penalty: {"w": vector(2.0, 2.0)},
            against: {"w": vector(0.0, 1.0)},
        },
    }
    whole = {
        (0, 0): {
            main: {"w": vector(0.5, 0.5)},
            penalty: {"w": vector(4.0, 4.0)},
            partial: {"w": vector(5.0, 5.0)},
            against: {"w": vector(1.0, -1.0)},
        }
    }
    found = addends_of(alone, whole, is_sum=False)
    summed = addends_of(alone, whole, is_sum=True)

    assert found[0, 1][main]["w"].tolist() == [0.0, 1.0]
    assert summed[0, 1][main]["w"].tolist() == [0.0, 0.5]
    assert found[0, 1][penalty]["w"].tolist() == pytest.approx([4.0, 4.0])
    assert found[0, 0][partial] is alone[0, 0][partial]
    assert found[0, 0][against] is alone[0, 0][against]


@pytest.fixture
def environment(tmp_path):
    """Return the folder of an environment with an interpreter and one program."""
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("python", "trainer"):
        (folder / name).symlink_to(sys.executable)
    return folder.parent


@pytest.mark.parametrize("program", ["python", "trainer"])
def test_a_command_is_moved_into_an_environment(environment, monkeypatch, program):
    """Its interpreter or a program that is installed there, and what it starts itself is looked for there first."""
    monkeypatch.setenv("PATH", f"{environment / 'bin'}:/usr/bin")
    [script] = scripts_of(f"A=1 {program} train.py", [], f"{environment},{environment}", 3)

    assert script.full.words == (str(environment / "bin" / program), "train.py")
    assert dict(script.full.variables) == {
        "A": "1",
        "PATH": f"{environment / 'bin'}:{environment / 'bin'}:/usr/bin",
    }
    assert str(script) == f"A=1 {program} train.py [{environment} | {environment}]"


def test_a_program_that_an_environment_lacks_is_refused(environment):
    with pytest.raises(UsageError, match="no-such-program: sh is not in"):
        scripts_of("sh train.sh", [], f"{environment},{environment}", 3)


def test_the_script_of_a_saved_case_is_known_again(environment):
    """Two commands, or one under two interpreters; the case of a subject has none."""
    python = sys.executable
    commands = {"full_command": f"{python} a.py", "accumulated_command": f"{python} b.py"}
    two = script_of({**commands, "optimizer_steps": 3})
    one = script_of({**commands, "versions": [str(environment)] * 2, "optimizer_steps": 3})

    assert (str(two), two.optimizer_steps) == (f"{python} a.py | {python} b.py", 3)
    assert str(one) == f"{python} a.py [{environment} | {environment}]"
    assert script_of({"target": "train_step.py"}) is None
