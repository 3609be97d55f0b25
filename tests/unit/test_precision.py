"""What accumulating costs: told from the contributions that arrived, and from two runs as written."""

from __future__ import annotations

import math

import pytest
import torch

from equivcheck.differences import Sums
from equivcheck.noise import UNITS, growth
from equivcheck.precision import judge_precision, native_gap
from equivcheck.recording import Recording, Step

WIDTH = 64
UNIT = 2.0**-24


def vector(seed):
    return torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(sample, contributions=(), *, matched=0, skipped=False, error=None):
    """Return a native step whose gradient is `sample`, off by `error` from float64: from the sum, if none is given."""
    if error is None:
        known = isinstance(sample.get("w"), torch.Tensor) and sample["w"].shape == SUM.shape
        wanted = SUM if known else None
        error = 0.0 if wanted is None else float((sample["w"] - wanted).norm() / wanted.norm())
    found = Step(0, "SGD", frozenset(), 2, 0, [0.1], matched=matched, skipped=skipped)
    found.sample = dict(sample)
    found.contributions = list(contributions)
    found.gradients = {"w": Sums(1.0, 0.0, error**2, WIDTH)}
    return found


class Lab:
    """An experiment of which the two native runs are known, and what float64 leaves of the contributions."""

    def __init__(self, full, accumulated, accumulation_steps=4, dtype="float32", promoted=None):
        runs = (Recording("any", [full], dtype=dtype), Recording("any", [accumulated], dtype=dtype))
        self._native = dict(zip(("native_reference", "native_candidate"), runs, strict=True))
        self.case = self
        self.crew = None
        self.accumulation_steps = accumulation_steps
        self._promoted = Recording("candidate", [promoted or step({"w": SUM}, PIECES)])

    def native(self, role):
        return self._native[role]

    def left_by_backward(self):
        return self._native["native_candidate"]

    def candidate(self):
        return self._promoted

    def contributed(self):
        return self._promoted

    def terms(self):
        return 16


PIECES = [{"w": vector(1)}, {"w": vector(2)}]
SUM = PIECES[0]["w"] + PIECES[1]["w"]


def rounded(relative):
    """Return the sum of the pieces, off by so much at a right angle to both."""
    basis = torch.linalg.qr(torch.stack([PIECES[0]["w"], PIECES[1]["w"], vector(3)]).T)[0]
    return SUM + relative * SUM.norm() * basis[:, 2]


@pytest.mark.parametrize(("factor", "loses"), [(0.5, False), (2.0, True)])
def test_accumulating_may_lose_units_times_the_growth(factor, loses):
    lost = factor * UNITS * growth(4) * UNIT
    found = judge_precision(Lab(step({"w": SUM}), step({"w": rounded(lost)}, PIECES)))

    assert found.accumulation == pytest.approx(lost)
    assert (found.loss is not None) is loses


@pytest.mark.parametrize(("left", "loses"), [(0.5, False), (2.0, True)])
def test_what_is_done_to_gradients_before_the_step_is_no_rounding(left, loses):
    """Where float64 shows it too, what the last backward left is judged."""
    lost = left * UNITS * growth(4) * UNIT
    native = step({"w": rounded(0.1)}, PIECES)
    native.left = {"w": rounded(lost)}
    lab = Lab(step({"w": SUM}), native, promoted=step({"w": rounded(0.1)}, PIECES))

    found = judge_precision(lab)

    assert found.accumulation == pytest.approx(lost)
    assert (found.loss is not None) is loses


def test_a_buffer_that_promotion_could_not_raise_is_no_edit():
    """Writes to it round in float64 as well."""
    native = step({"w": rounded(0.1)}, PIECES)
    lab = Lab(step({"w": SUM}), native, promoted=step({"w": rounded(0.1)}, PIECES))
    lab.candidate().lowered["in-place write"] = "bfloat16"

    assert judge_precision(lab).loss is not None


@pytest.mark.parametrize(
    ("lost", "own", "accumulation_steps", "loses"),
    [
        (2.0, 1.0, 4, True),
        (2.0, 4.0, 4, False),
        (2.0, 1.0, 1, False),
        (2.0, 0.0, 4, False),
        (0.9, 0.5, 4, False),
    ],
    ids=[
        "more than its own error",
        "less",
        "one micro-batch",
        "no error of its own",
        "less than one roundoff",
    ],
)
def test_a_coarse_dtype_is_judged_by_the_full_batch(lost, own, accumulation_steps, loses):
    """Its own error is what a correct run in that dtype has anyway; all in roundoffs of bfloat16."""
    unit = 2.0**-8
    full = step({"w": SUM}, error=own * unit)
    candidate = step({"w": rounded(lost * unit)}, PIECES)
    lab = Lab(full, candidate, accumulation_steps, dtype="bfloat16")

    assert (judge_precision(lab).loss is not None) is loses


@pytest.mark.parametrize(("weights", "loses"), [(1.0, True), (1e-3, False)], ids=["alike", "few"])
def test_a_gradient_of_few_large_elements_may_exceed_its_own_error_by_chance(weights, loses):
    """What 64 elements of one size lose is an average; where four of them outweigh the others it is not."""
    unit = 2.0**-8
    full = step({"w": torch.cat([torch.ones(4), torch.full((60,), weights)]).double()}, error=unit)
    lab = Lab(full, step({"w": rounded(1.5 * unit)}, PIECES), dtype="bfloat16")

    assert (judge_precision(lab).loss is not None) is loses


NOTHING = {
    "no step of the reference": step({"w": SUM}, PIECES, matched=None),
    "a skipped step": step({"w": SUM}, PIECES, skipped=True),
    "no contribution": step({"w": SUM}),
    "no gradient": step({"w": None}, PIECES),
    "contributions of other parameters": step({"v": SUM}, PIECES),
    "fewer coordinates than determine a fit": step(
        {"w": SUM[:4]}, [{"w": each["w"][:4]} for each in PIECES]
    ),
    "a contribution that is inf": step({"w": SUM}, [PIECES[0], {"w": vector(2) / 0.0}]),
    "a gradient that is inf": step({"w": SUM / 0.0}, PIECES),
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_cannot_be_measured_is_no_loss(name):
    accumulated = NOTHING[name]
    found = judge_precision(Lab(step(accumulated.sample), accumulated))

    assert found.units == found.accumulation == 0.0
    assert found.loss is None


def test_a_contribution_may_lack_a_parameter():
    """An expert that no row of a micro-batch was sent to."""
    contributions = [{"w": PIECES[0]["w"], "v": vector(4)}, {"w": PIECES[1]["w"]}]
    found = judge_precision(
        Lab(step({"w": SUM}), step({"w": SUM, "v": vector(4), "u": None}, contributions))
    )

    assert found.units < 1.0


def full_and(other):
    return Recording("any", [step({"w": SUM})]), Recording("any", [other])


@pytest.mark.parametrize(
    ("other", "gap"),
    [
        (step({"w": 1.5 * SUM}), 0.5),
        (step({"w": 1.5 * SUM}, matched=None), 0.0),
        (step({"w": 1.5 * SUM}, matched=1), 0.0),
        (step({"w": 1.5 * SUM}, skipped=True), 0.0),
        (step({"w": None}), 0.0),
        (step({"v": SUM}), 0.0),
    ],
    ids=["half", "unmatched", "matched elsewhere", "skipped", "no gradient", "other parameters"],
)
def test_the_gap_is_that_of_gradients_that_both_have(other, gap):
    assert native_gap(*full_and(other)) == pytest.approx(gap)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_what_a_rank_does_not_hold_is_no_gap(factor):
    """Its share alone is compared, and both together; a gradient that is nan on both agrees with nothing."""
    full, accumulated = full_and(step({"w": SUM}))
    share = step({"w": factor * SUM})
    share.sample["w"][: WIDTH // 2] = math.nan
    share.parts = {"w": 1}
    accumulated.ranks = [Recording("any", [share])]

    assert native_gap(full, accumulated) == pytest.approx(factor - 1.0)

    accumulated.steps[0].sample["w"] = share.sample["w"]
    assert native_gap(full, accumulated) == math.inf


@pytest.mark.parametrize("size", [0.0, math.inf])
def test_a_gradient_without_a_size_shows_no_gap(size):
    full, accumulated = full_and(step({"w": SUM}))
    full.steps[0].sample["w"] = torch.full((WIDTH,), size, dtype=torch.float64)

    assert native_gap(full, accumulated) == 0.0


def test_a_step_without_a_finite_error_does_not_count():
    full = step({"w": SUM})
    full.gradients = {"w": Sums(finite=False)}
    found = judge_precision(Lab(full, step({"w": SUM}, PIECES)))

    assert found.full_batch == 0.0


def test_a_rest_that_both_runs_together_do_not_err_by_is_no_rounding():
    """Contributions that arrived elsewhere leave a rest; gradients that agree with float64 were not rounded by it."""
    full, accumulated = step({"w": SUM}, error=1e-7), step({"w": SUM}, PIECES[:1], error=1e-7)

    found = judge_precision(Lab(full, accumulated))

    assert found.accumulation == pytest.approx(2e-7)
    assert found.loss is None
