"""What counts as a difference: each kind, just beyond what its control allows, and just within."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from equivcheck.differences import Sums, sums
from equivcheck.noise import SAFETY, UNIT_ROUNDOFF
from equivcheck.recording import Backward, Kept, Recording, Step
from equivcheck.verdict import (
    KINDS,
    UPDATE_NOISE,
    Noise,
    judge,
    logged_difference,
    rate_difference,
    roundoff_of,
    unfit,
    whole_log,
)

NAN = Sums(math.nan, math.nan, math.nan, 1, finite=False)
SAMPLES = frozenset({(0, 0), (0, 1)})


def off(relative, size=1.0):
    """Return the sums of a tensor of some norm that is off by so much, at a right angle."""
    return Sums(size**2, 0.0, (relative * size) ** 2, 1)


def step(**fields):
    """Return a step that matches the reference's only one, with what differs in it."""
    found = Step(0, "SGD", SAMPLES, 2, 0, [0.1], matched=0)
    found.gradients = found.applied = {"w": off(0.0)}
    return replace(found, **fields)


def recording(*steps, logged=None, moved=1.0):
    """Return a run of these steps; a reference keeps as much for each."""
    kept = Kept({}, {}, {}, {}, {}, {}, {"w": moved})
    return Recording("any", steps=list(steps), logged=logged, kept=[kept for _ in steps])


REFERENCE = recording(step(), logged=[1.0])


def noise(*controls, **fields):
    """Return the noise of some controls."""
    return Noise(2, [recording(each, logged=[1.0]) for each in controls], **fields)


FLOOR = noise().floor()


def test_a_run_like_the_reference_has_no_findings():
    result = judge(REFERENCE, recording(step(), logged=[1.0]), noise(step()))

    assert result.same
    assert result.margin == math.inf
    assert result.power == FLOOR
    assert result.compared == 1


DIFFERENT = {
    "samples of no step": (step(matched=None), ["samples", "samples"]),
    "samples of a step left out": (step(missing=1), ["samples"]),
    "a skipped step": (step(skipped=True), ["samples"]),
    "an absent gradient": (step(none_mismatch=["w"]), ["none"]),
    "gradients": (step(gradients={"w": off(0.5)}), ["gradients"]),
    "gradients that are nan": (step(gradients={"w": NAN}), ["gradients"]),
    "a gradient where there is none": (step(gradients={"w": Sums(0, 0, 1, 1)}), ["gradients"]),
    "applied": (step(applied={"w": off(0.5)}), ["applied"]),
    "parameters": (step(parameters={"w": off(0.5)}), ["parameters"]),
    "parameters that are nan": (step(parameters={"w": NAN}), ["parameters"]),
    "parameters that did not move": (step(parameters={"v": off(0.5)}), ["parameters"]),
    "state": (step(state={"w.exp_avg": off(0.5)}), ["state"]),
    "state that was zero": (step(state={"w.exp_avg": Sums(0, 0, 1, 1)}), ["state"]),
    "buffers": (step(buffers={"mean": off(0.5)}), ["buffers"]),
    "buffers that are nan": (step(buffers={"mean": NAN}), ["buffers"]),
    "a buffer that was zero": (step(buffers={"mean": Sums(0, 0, 1, 1)}), ["buffers"]),
    "shadow weights": (step(shadows={"w": off(0.5)}), ["shadows"]),
    "a learning rate": (step(learning_rates=[0.2]), ["learning_rates"]),
    "a learning rate more": (step(learning_rates=[0.1, 0.1]), ["learning_rates"]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_kind_of_difference_is_found_once(name):
    """A gradient that differs explains its update, which is then not judged."""
    candidate, kinds = DIFFERENT[name]
    result = judge(REFERENCE, recording(candidate, logged=[1.0]), noise(step()))

    assert [each.kind for each in result.findings] == kinds
    assert result.kinds() <= set(KINDS)
    assert result.first(*kinds) is result.findings[0]


@pytest.mark.parametrize("kind", ["gradients", "applied", "parameters", "state", "buffers"])
def test_what_the_control_shows_is_allowed_a_hundredfold(kind):
    control = step(**{kind: {"w": off(2.0 * UPDATE_NOISE)}})
    limit = 2.0 * SAFETY * UPDATE_NOISE

    for factor, same in ((0.5, True), (2.0, False)):
        candidate = step(**{kind: {"w": off(factor * limit)}})
        result = judge(REFERENCE, recording(candidate), noise(control))
        assert result.same is same


def test_controls_that_say_nothing_allow_no_more_than_the_floor():
    """One that is not finite, of another step, or without the tensor."""
    controls = [
        step(gradients={"w": NAN}),
        step(matched=None, gradients={"w": off(1.0)}),
        step(gradients={"v": off(0.0)}),
    ]

    for factor, same in ((0.5, True), (2.0, False)):
        candidate = recording(step(gradients={"w": off(factor * FLOOR)}))
        assert judge(REFERENCE, candidate, noise(*controls)).same is same


def test_the_margin_is_what_is_allowed_over_what_was_measured():
    result = judge(REFERENCE, recording(step(gradients={"w": off(FLOOR / 4)})), noise(step()))

    assert result.margin == pytest.approx(4.0)


def test_a_tensor_of_rounding_noise_is_zero_in_both():
    """The gradient of a bias without effect, say: any difference between two roundings is none."""
    tiny = torch.full((1,), FLOOR / 4, dtype=torch.float64)
    gradients = {"w": off(0.0), "bias": sums(tiny, -tiny)}
    result = judge(REFERENCE, recording(step(gradients=gradients)), noise(step()))

    assert result.same
    assert result.zero == {0: {"bias"}}


def test_many_tensors_within_their_limits_can_differ_together():
    """Each by what one control showed for it alone: no control shows so much for all of them."""
    names = [f"w{i}" for i in range(400)]
    quiet = dict.fromkeys(names, off(0.0))
    controls = [step(gradients={**quiet, name: off(UPDATE_NOISE)}) for name in names]
    gradients = dict.fromkeys(names, off(0.5 * SAFETY * UPDATE_NOISE))
    result = judge(REFERENCE, recording(step(gradients=gradients)), noise(*controls))

    assert [(each.kind, each.names) for each in result.findings] == [("gradients", ())]


def test_pieces_that_cancel_allow_what_their_sum_may_round_to():
    candidate = recording(step(gradients={"w": off(8 * FLOOR), "v": off(0.0, size=10.0)}))

    assert not judge(REFERENCE, candidate, noise(step())).same
    assert judge(REFERENCE, candidate, noise(step(), pieces_norm={(0, "w"): 16.0})).same


@pytest.mark.parametrize("roundoff", [2.0**-53, 2.0**-24])
def test_a_small_gradient_may_hold_the_rounding_of_the_large_ones(roundoff):
    """Up to SAFETY roundings of the whole gradient."""
    large = 1e7
    small = {
        factor: recording(
            step(gradients={"w": off(factor * SAFETY * roundoff * large), "v": off(0.0, large)})
        )
        for factor in (0.5, 2.0)
    }
    of_few = noise(step(), roundoff=roundoff)

    assert judge(REFERENCE, small[0.5], of_few).same
    assert not judge(REFERENCE, small[2.0], of_few).same


def test_the_worst_tensor_is_named_first():
    gradients = {"v": off(0.25), "w": off(0.5), "u": NAN}
    finding = judge(REFERENCE, recording(step(gradients=gradients)), noise(step())).findings[0]

    assert finding.names == ("u", "w", "v")
    assert finding.relative == math.inf


def test_an_update_may_be_as_noisy_as_the_gradient_it_is_made_of():
    """In proportion to how far the parameter moved, not to its size."""
    candidate = recording(step(parameters={"w": off(UPDATE_NOISE / 2)}))

    assert judge(recording(step(), moved=1.0), candidate, noise(step())).same
    assert not judge(recording(step(), moved=0.25), candidate, noise(step())).same


def test_a_step_of_the_reference_that_nothing_matches_is_missing():
    second = step(index=1, samples=frozenset({(0, 2)}))
    result = judge(recording(step(), second), recording(step()), noise(step()))

    assert [(f.kind, f.matched, f.detail) for f in result.findings] == [("samples", 1, "missing")]


def test_nothing_compared_has_no_power():
    assert judge(REFERENCE, recording(step(matched=None)), noise(step())).power == math.inf


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        ([1.0], [1.0], 0.0),
        ([2.0], [1.0], 0.5),
        ([0.0], [1.0], math.inf),
        ([1.0], [1.0, 1.0], math.inf),
    ],
    ids=["equal", "half", "from zero", "another number of groups"],
)
def test_a_rate_differs_relative_to_the_full_batch(mine, theirs, expected):
    assert rate_difference(step(learning_rates=mine), step(learning_rates=theirs)) == expected


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [
        (None, [1.0], None),
        ([1.0], None, None),
        ([1.0], [1.0, 1.0], None),
        ([1.0, 1.0], [1.0, 1.0], None),
        ([0.0], [0.0], 0.0),
        ([0.0], [1.0], math.inf),
        ([2.0], [3.0], 0.5),
        ([math.inf], [math.inf], 0.0),
        ([math.nan], [math.nan], 0.0),
        ([math.nan], [1.0], math.inf),
        ([1.0], [math.nan], math.inf),
    ],
    ids=[
        "none",
        "none there",
        "lengths",
        "more than steps",
        "zeros",
        "from zero",
        "half",
        "inf",
        "nan",
        "nan from one",
        "one from nan",
    ],
)
def test_logs_are_compared_where_they_hold_one_loss_per_step(mine, theirs, expected):
    found = logged_difference(recording(step(), logged=mine), recording(step(), logged=theirs))

    assert found == expected


@pytest.mark.parametrize(("logged", "kinds"), [(True, {"logged"}), (False, set())])
def test_a_log_that_differs_is_a_finding_where_logs_are_judged(logged, kinds):
    result = judge(REFERENCE, recording(step(), logged=[2.0]), noise(step()), logged=logged)

    assert result.kinds() == kinds


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        (recording(step()), None),
        (recording(step(gradients={"w": Sums()})), None),
        (recording(step(gradients={"w": off(0.5)})), 0.5),
        (recording(step(), logged=[1.5]), 0.5),
        (recording(step(gradients={"w": NAN})), math.inf),
        (recording(step(matched=None)), math.inf),
        (recording(), math.inf),
    ],
    ids=["equal", "zeros", "gradients", "log", "nan", "other samples", "no steps"],
)
def test_a_control_is_fit_if_it_differs_by_rounding_only(control, expected):
    assert unfit(control, REFERENCE, 2, UNIT_ROUNDOFF[torch.float64]) == expected


def test_the_lowest_precision_that_computed_counts():
    found = [roundoff_of(names) for names in ([], ["float32", "bfloat16"], ["int8"])]

    double = UNIT_ROUNDOFF[torch.float64]
    assert found == [double, UNIT_ROUNDOFF[torch.bfloat16], double]


def rank(logged, samples, root=None):
    """Return what one rank saw of one optimizer step."""
    own = frozenset((0, sample) for sample in samples)
    seen = recording(step(samples=own, backwards=1), logged=logged)
    if root is not None:
        seen.backwards = [Backward(0, 1, root, 1.0, "MulBackward0")]
    return seen


def of_ranks(*ranks, logged=None):
    return replace(recording(step(), logged=logged), ranks=list(ranks))


@pytest.mark.parametrize(
    ("ranks", "whole"),
    [
        ((rank([1.0], [0]), rank([1.0], [1])), [1.0]),
        ((rank([0.5], [0]), rank([1.5], [1])), [1.0]),
        ((rank([0.25], [0]), rank([1.25], [1, 2, 3])), [1.0]),
        ((rank([0.5], [0], 0.5), rank(None, [1], 1.5)), [1.0]),
        ((rank([0.7], [0], 0.5), rank(None, [1], 1.5)), [0.7]),
        ((rank([0.7], [0]), rank([0.5, 1.5], [1])), [0.7]),
        ((rank(None, [0]), rank(None, [1])), None),
        ((rank([0.25], [0]), recording(logged=[1.25])), [0.75]),
    ],
    ids=[
        "the whole loss",
        "its share's",
        "shares of unequal size",
        "rank 0 alone, its roots",
        "rank 0 alone, something else",
        "not as often on all",
        "nothing",
        "a rank that never stepped",
    ],
)
def test_ranks_log_the_whole_loss_or_that_of_their_share(ranks, whole):
    """Of what a rank's log may mean, the closest to the full batch's is taken: the loss of a share is no lie."""
    candidate = of_ranks(*ranks, logged=ranks[0].logged)

    assert whole_log(REFERENCE, candidate) == whole
