"""The search for causes, in a world where it is known what each intervention puts right."""

from __future__ import annotations

import pytest

from equivcheck import diagnose as module
from equivcheck.diagnose import FRONTIER, TRIALS, diagnose
from equivcheck.differences import Sums
from equivcheck.errors import StepError
from equivcheck.interventions import Intervention
from equivcheck.recording import Recording, Step
from equivcheck.verdict import Finding, Judgement
from equivcheck.view import Suspicion


class Right(Intervention):
    """Puts the fault of one letter right; some loops do not survive it, or not without another."""

    def __init__(self, letter, without=None):
        self.name = letter
        self.without = without


class World:
    """An experiment with faults.

    Args:
        faults: By letter, how much it changes what kind of finding.
        suspicions: From the letters already put right, what is suspected then.
    """

    intervenes = True
    trials = TRIALS

    def __init__(self, faults, suspicions):
        self.faults = faults
        self.suspicions = suspicions
        self.case = self
        self.accumulation_steps = 2
        self.runs = 0
        self.left = None

    def judgement(self, interventions):
        self.runs += 1
        put_right = {each.name for each in interventions}
        if any(each.without and each.without not in put_right for each in interventions):
            message = "no"
            raise StepError(message)
        return Judgement(
            [
                Finding(kind, 0, 0, (), size, 0.0)
                for letter, (kind, size) in self.faults.items()
                if letter not in put_right
            ],
            left=self.left,
        )

    def candidate(self, _interventions):
        return Recording("candidate")


@pytest.fixture
def search(monkeypatch):
    """Return a function that searches a world and returns the diagnosis."""

    def run(faults, suspicions, *, log_explained=False, left=None):
        world = World(faults, suspicions)
        world.left = left

        def suspect(view):
            return world.suspicions({each.name for each in view.chosen})

        monkeypatch.setattr(module, "suspect", suspect)
        monkeypatch.setattr(module, "explained", lambda _: log_explained)
        found = diagnose(world)
        assert world.runs <= TRIALS + 2
        return found

    return run


def by(code, *letters, **fields):
    """Return the suspicion of a code, put right by any of some letters."""
    return Suspicion(code, [(Right(letter),) for letter in letters], **fields)


def always(*suspicions):
    return lambda _: list(suspicions)


def told(found):
    return [f"{each['code']} {each['status']}" for each in found.causes]


def test_one_cause_is_proved_by_what_puts_it_right(search):
    """Others that are suspected too are not named."""
    found = search(
        {"a": ("gradients", 1.0)}, always(by("EQ103", "x"), by("EQ101", "y", "a"), by("EQ102", "z"))
    )

    assert told(found) == ["EQ101 proved"]
    assert found.causes[0]["evidence"]["intervention"] == {
        "put_right": ["a"],
        "relative_before": 1.0,
        "relative_after": 0.0,
    }
    assert [each["within_noise"] for each in found.trials] == [False, False, True]


def test_two_causes_are_proved_together_and_the_larger_comes_first(search):
    found = search(
        {"a": ("gradients", 0.5), "b": ("buffers", 2.0)},
        always(by("EQ101", "a"), by("EQ309", "b"), by("EQ103", "x")),
    )

    assert told(found) == ["EQ309 proved", "EQ101 proved"]


def test_three_causes_are_proved_together(search):
    found = search(
        {"a": ("gradients", 1.0), "b": ("buffers", 1.0), "c": ("state", 1.0)},
        always(by("EQ101", "a"), by("EQ309", "b"), by("EQ312", "c")),
    )

    assert told(found) == ["EQ101 proved", "EQ309 proved", "EQ312 proved"]


def test_four_causes_are_more_than_a_proof_can_hold(search):
    """Those that helped are suspected."""
    faults = {letter: (f"kind {letter}", 1.0) for letter in "abcd"}
    codes = ["EQ101", "EQ301", "EQ306", "EQ312"]
    found = search(faults, always(*(by(c, x) for c, x in zip(codes, "abcd", strict=True))))

    assert told(found) == [f"{code} suspected" for code in codes]


def test_of_two_that_a_loop_survives_only_together_both_are_needed(search):
    second = Suspicion("EQ403", [(Right("b", without="a"),)])
    found = search(
        {"a": ("gradients", 1.0), "b": ("gradients", 0.5)}, always(second, by("EQ101", "a"))
    )

    assert sorted(told(found)) == ["EQ101 proved", "EQ403 proved"]


def test_a_second_fault_may_show_only_when_the_first_is_put_right(search):
    def suspicions(put_right):
        return [by("EQ301", "a")] if "a" not in put_right else [by("EQ101", "b")]

    found = search({"a": ("gradients", 1.0), "b": ("gradients", 0.5)}, suspicions)

    assert told(found) == ["EQ301 proved", "EQ101 proved"]


SPECIAL = by("EQ701", proved=True, explains=frozenset({"logged"}))


def test_a_cause_with_a_proof_of_its_own_needs_no_run(search):
    found = search({"a": ("logged", 1.0)}, always(SPECIAL))

    assert told(found) == ["EQ701 proved"]
    assert found.trials == []


def test_what_is_left_of_a_run_that_is_judged_where_it_leaves_its_parameters_is_theirs(search):
    """Its gradients differ, and count for nothing."""
    step = Step(0, "SGD", frozenset(), 1, 0, [0.1], matched=0)
    step.parameters = {"w": Sums(1.0, 0.0, 1e-30, 1)}
    left = Recording("candidate", steps=[step])
    found = search({"a": ("gradients", 1.0)}, always(by("EQ103", "a")), left=left)

    assert told(found) == ["EQ103 proved"]
    assert found.causes[0]["evidence"]["intervention"]["relative_after"] == 1e-15


def test_a_proof_of_its_own_and_an_intervention_go_together(search):
    found = search(
        {"a": ("gradients", 1.0), "b": ("logged", 0.5)}, always(SPECIAL, by("EQ101", "a"))
    )

    assert told(found) == ["EQ101 proved", "EQ701 proved"]


def test_a_log_that_the_weights_explain_is_no_fault_of_its_own(search):
    faults = {"a": ("gradients", 0.5), "b": ("logged", 1.0)}

    for suspicions in (always(by("EQ101", "a")), always(SPECIAL, by("EQ101", "a"))):
        assert told(search(faults, suspicions, log_explained=True)) == ["EQ101 proved"]


def test_a_log_that_differs_alone_is_explained_by_no_other_fault(search):
    """Whatever is put right then, nothing gets better, and nothing is proved."""
    found = search({"b": ("logged", 1.0)}, always(by("EQ101", "x")), log_explained=True)

    assert told(found) == ["EQ000 suspected"]


def test_a_part_that_is_not_needed_is_not_named(search):
    """The second one only shows a cause that, with the first, is enough."""

    def suspicions(put_right):
        known = [by("EQ101", "a"), by("EQ102", "x")]
        return [*known, SPECIAL] if {"a", "x"} <= put_right else known

    faults = {"a": ("gradients", 1.0), "b": ("logged", 1.0), "x": ("logged", 0.5)}
    found = search(faults, suspicions)

    assert told(found) == ["EQ101 proved", "EQ701 proved"]


def test_nothing_is_tried_beside_what_changes_nothing(search):
    """Runs are for what may be part of a proof."""
    suspicions = always(by("EQ103", "x"), by("EQ102", "y"), by("EQ105", "z"))
    found = search({"a": ("gradients", 1.0)}, suspicions)

    assert [each["codes"] for each in found.trials] == [["EQ103"], ["EQ102"], ["EQ105"]]


def test_an_intervention_that_the_loop_does_not_survive_is_no_proof(search):
    broken = Suspicion("EQ103", [(Right("a", without="any other"),)])
    found = search({"a": ("gradients", 1.0)}, always(broken, by("EQ101", "a")))

    assert told(found) == ["EQ101 proved"]
    assert (found.trials[0]["within_noise"], found.trials[0]["relative"]) == (False, None)


def test_a_suspicion_that_helped_by_half_is_kept_and_one_that_did_not_is_ruled_out(search):
    faults = {"a": ("gradients", 1.0), "b": ("gradients", 0.25)}
    found = search(faults, always(by("EQ101", "a"), by("EQ102", "x"), by("EQ101", "x")))

    assert told(found) == ["EQ101 suspected"]
    assert found.ruled_out == ["EQ102"]


def test_a_suspicion_that_nothing_can_test_stays_one(search):
    found = search({"a": ("gradients", 1.0)}, always(by("EQ202"), by("EQ102", "x")))

    assert told(found) == ["EQ202 suspected"]


def test_what_nothing_explains_is_named_so_with_what_was_ruled_out(search):
    found = search({"a": ("gradients", 1.0)}, always(by("EQ102", "x"), by("EQ103", "y")))

    assert told(found) == ["EQ000 suspected"]
    assert found.causes[0]["evidence"] == {"ruled_out": ["EQ102", "EQ103"]}


def failing(_put_right):
    message = "no"
    raise StepError(message)


def test_detectors_that_fail_leave_the_divergence_unnamed(search):
    assert told(search({"a": ("gradients", 1.0)}, failing)) == ["EQ000 suspected"]


def test_detectors_may_fail_on_what_was_put_right_by_halves(search):
    def suspicions(put_right):
        return failing(put_right) if put_right else [by("EQ101", "a")]

    found = search({"a": ("gradients", 1.0), "b": ("buffers", 1.0)}, suspicions)

    assert told(found) == ["EQ101 suspected"]


def test_a_search_ends_however_much_is_suspected(search):
    """More suspicions than runs that may be spent, and wider than what is followed."""
    codes = ["EQ101", "EQ102", "EQ103", "EQ104", "EQ105", "EQ106", "EQ107", "EQ108", "EQ109"]
    many = [by(code, *(f"{code} {i}" for i in range(TRIALS))) for code in codes]
    found = search({"a": ("gradients", 1.0)}, always(*many))

    assert FRONTIER < len(codes)
    assert len(found.trials) <= TRIALS
    assert told(found) == ["EQ000 suspected"]


def test_a_fault_of_the_full_batch_is_marked():
    entry = module.cause(Suspicion("EQ302", shared=True), "proved", {"fix": "zero_grad()"})

    assert entry["evidence"] == {"shared": True}
    assert entry["fix"] == "zero_grad()"
