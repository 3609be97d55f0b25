"""What is told, and what is left alone, where ranks differ: by recordings of two ranks that no loop is needed for."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from equivcheck import doubts, precision, traffic
from equivcheck import view as looks
from equivcheck.attribution import solve
from equivcheck.detectors import addends, coupling, ranks, schedule, stages, taken, weights
from equivcheck.differences import Sums
from equivcheck.errors import UsageError
from equivcheck.fit import Attribution, attribute, sampled
from equivcheck.recording import Backward, Collective, Event, Place, Recording, Step
from equivcheck.subject_experiment import SubjectExperiment
from equivcheck.verdict import Finding

NAN = math.nan


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


G = vector(3.0, 4.0)
SIZE = Sums(25.0, 0.0, 0.0, 2)


def off(relative):
    """Return the sums of a gradient that is so much longer than the reference's."""
    return Sums(25.0, 25.0 * relative, 25.0 * relative**2, 2)


def step(index=0, *, sample=G, applied=SIZE, left=G, matched=0, **fields):
    found = Step(index, "SGD", frozenset({(0, index)}), 1, 0, [0.1], matched=matched, **fields)
    found.sample, found.applied = {"w": sample}, {"w": applied}
    found.left = {} if left is None else {"w": left}
    return found


def recording(*steps, kinds=("step",), **fields):
    """Return what a rank saw: before each of its steps, these events."""
    timeline = [Event(kind, 1, 1, dict(fields)) for _ in steps for kind in kinds]
    return Recording("candidate", steps=list(steps), timeline=timeline)


def refuse(*_):
    raise UsageError("the loop asserts accumulation_steps == 2")


class Seen:
    """The accumulated run of two ranks, and the full batch's.

    Args:
        ranks: What each saw.
        full: The full batch's run.
        kind: What differs.
        other: The run at another K; None if the loop refuses it.
    """

    chosen = ()
    steps = 2

    def __init__(self, *ranks, full=None, kind="gradients", other=None, rows=8):
        self.cycles = {(0, 0): 0, (0, 1): 1}
        self.candidate = Recording("candidate", steps=ranks[0].steps, ranks=list(ranks))
        self.reference = full or recording(step())
        self.attributions = []
        finding = Finding(kind, 0, 0, ("w",), 1.0, 0.0)
        self.judgement = SimpleNamespace(
            first=lambda *kinds: finding if kind in kinds else None, findings=[finding]
        )
        self.experiment = SimpleNamespace(
            case=SimpleNamespace(world_size=2, shares=2),
            data=SimpleNamespace(rows=[rows, rows]),
            noise=lambda: SimpleNamespace(floor=lambda: 1e-15),
            left_on_ranks=lambda _: self.candidate,
            left_by_full_batch=lambda: self.reference,
            at=refuse if other is None else lambda _: other,
            reference_of_horizon=refuse,
        )

    def cycle_of(self, matched):
        return matched


def codes(suspicions):
    return [each.code for each in suspicions]


# ---- how far ranks are apart ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([{"w": G}], 0.0),
        ([{"w": G}, {"w": G}], 0.0),
        ([{"w": G}, {"w": 2 * G}], 0.5),
        ([{"w": G}, {"w": None}], 1.0),
        ([{"w": None}, {"w": None}], 0.0),
        ([{"w": 0 * G}, {"w": 0 * G}], 0.0),
    ],
    ids=["one rank", "alike", "twice", "on one only", "on none", "zeros"],
)
def test_gradients_are_apart_by_their_largest_relative_difference(held, expected):
    steps = [step(sample=each["w"]) for each in held]

    assert ranks.spread(held) == pytest.approx(expected)
    assert ranks.gradient_spread(steps) == pytest.approx(expected)


def test_parts_of_a_gradient_are_not_apart():
    """Each rank holds another one; so does a rank that has no such parameter."""
    mine, other = step(parts={"w": 0}), step(sample=2 * G, parts={"w": 1})
    foreign = step(sample=2 * G)
    foreign.sample = {"v": G}

    assert ranks.gradient_spread([mine, other]) == 0.0
    assert ranks.gradient_spread([step(), foreign]) == 0.0


# ---- what a rank does between the last backward and the step ------------------------------------


def test_a_gradient_changed_on_one_rank_only_is_told():
    seen = Seen(recording(step()), recording(step(sample=0.5 * G, applied=off(-0.5))))

    assert codes(taken.suspect(seen)) == ["EQ505"]


@pytest.mark.parametrize(
    "seen",
    [
        Seen(recording(step(), step(1)), recording(step(applied=SIZE)), kind="learning_rates"),
        Seen(recording(step()), recording()),
        Seen(recording(step(left=None)), recording(step(left=None))),
        Seen(recording(step()), recording(step(clipped=True))),
        Seen(recording(step(), kinds=["skipped"]), recording(step(), kinds=["skipped"])),
    ],
    ids=[
        "no gradient differs",
        "a rank that steps less often",
        "what backwards left is unknown",
        "a call on one rank that changes nothing",
        "steps that a scaler left out",
    ],
)
def test_ranks_that_did_nothing_of_their_own_are_left_alone(seen):
    assert taken.suspect(seen) == []


def test_a_clip_that_some_make_before_the_reduction_is_told_by_its_shares():
    """Rank 1 halves its gradient; what both step with is the mean of what they have then."""
    other = vector(-4.0, 3.0)
    mean = (G + 0.5 * other) / 2
    seen = Seen(
        recording(step(sample=mean, left=G)), recording(step(sample=mean, left=other, clipped=True))
    )
    seen.reference.kept = [SimpleNamespace(gradients={"w": G}, applied={"w": 0.5 * G})]
    (found,) = taken.suspect(seen)

    assert (found.code, found.evidence["ranks_that_clip"]) == ("EQ506", [1])
    assert found.evidence["share_of_each_rank"] == pytest.approx([1.0, 0.5])


def test_a_step_of_its_own_is_passed_over_where_some_ranks_clip():
    """The full batch has none like it, to say what a clip would have been."""
    other = vector(-4.0, 3.0)
    mean = (G + 0.5 * other) / 2
    mine = recording(step(sample=mean, left=G, matched=None), step(1, sample=mean, left=G))
    theirs = recording(
        step(sample=mean, left=other, matched=None, clipped=True),
        step(1, sample=mean, left=other, clipped=True),
    )
    seen = Seen(mine, theirs)
    seen.reference.kept = [SimpleNamespace(gradients={"w": G}, applied={"w": 0.5 * G})]
    (found,) = taken.suspect(seen)

    assert found.code == "EQ506"


@pytest.mark.parametrize(
    ("left", "stepped", "shares"),
    [
        ([G, vector(-4.0, 3.0)], vector(0.0, 0.0), []),
        ([G, 2 * G], G, []),
        ([G, vector(-4.0, 3.0)], (G + vector(-4.0, 3.0)) / 2, []),
        ([G, vector(-4.0, 3.0)], (0.5 * G + vector(-4.0, 3.0)) / 2, [0.5, 1.0]),
        ([G, vector(-4.0, 3.0)], (0.5 * G + 1.5 * vector(-4.0, 3.0)) / 2, []),
        ([G], G, []),
        ([G, None], G, []),
    ],
    ids=[
        "nothing",
        "pieces alike tell nothing",
        "the mean",
        "one shortened",
        "one longer: counts",
        "one rank",
        "on one rank only",
    ],
)
def test_shares_are_a_clips_where_some_are_shorter_and_none_longer(left, stepped, shares):
    found = taken._shortened([{"w": each} for each in left], {"w": stepped})

    assert found == pytest.approx(shares)


@pytest.mark.parametrize(
    ("left", "stepped", "factor"),
    [
        ({"w": G}, {"w": 0.5 * G}, 0.5),
        ({"w": vector(3.0, NAN)}, {"w": vector(1.5, NAN)}, 0.5),
        ({"w": G}, {"w": -G}, None),
        ({"w": G}, {"w": vector(4.0, 3.0)}, None),
        ({"w": None}, {"w": G}, None),
        ({}, {"w": None}, None),
    ],
    ids=["half", "of a part", "turned round", "another", "from nothing", "none"],
)
def test_what_is_done_to_a_gradient_is_a_factor_or_something_else(left, stepped, factor):
    assert taken._factor(left, stepped) == factor


def parted(index, factor, *, matched=0, norm=5.0):
    return step(index, sample=factor * G, matched=matched, norm=norm, parts={"w": 0})


@pytest.mark.parametrize(
    ("ranks_", "told"),
    [
        ((recording(parted(0, 0.5)), recording(parted(0, 0.25))), ["EQ506"]),
        ((recording(parted(0, 0.5)), recording(parted(0, 0.5))), []),
        (
            (
                recording(parted(0, 0.5, matched=None), parted(1, 0.5)),
                recording(parted(0, 0.25, matched=None), parted(1, 0.5)),
            ),
            [],
        ),
        ((recording(parted(0, 0.5), parted(1, 0.5)), recording(parted(0, 0.5))), []),
        ((recording(parted(0, 0.5)), recording(parted(0, 2.0))), []),
        ((recording(parted(0, 0.5), kinds=["clip"]), recording(parted(0, 0.25))), []),
    ],
    ids=["norms of parts", "as the whole", "an extra step", "fewer steps", "longer", "a call"],
)
def test_parts_are_clipped_by_the_norm_of_the_whole(ranks_, told):
    full = recording(step(sample=0.5 * G, norm=5.0))

    assert codes(taken.suspect(Seen(*ranks_, full=full))) == told


# ---- clips that all ranks call ------------------------------------------------------------------


def clipped(maximum, *, kind="clip", **detail):
    """Return a run with one clip before its step."""
    found = recording(step(applied=off(0.5)), kinds=[kind, "step"], **detail)
    found.timeline[0].detail["max_norm"] = maximum
    found.backwards = [Backward(0, 1, 1.0, 1.0, "MeanBackward0")]
    found.places = lambda _: [Place(0, 0, 1, True)]
    return found


@pytest.mark.parametrize(
    ("maximum", "elsewhere", "told"),
    [
        (2.0, 2.0, ["EQ506"]),
        (0.5, 0.5, ["EQ506"]),
        (2.0, 3.0, []),
        (2.0, None, []),
        (1.7, 1.7, []),
        (1.0, 1.0, []),
    ],
    ids=["times R", "over R", "times K", "another K refused", "no ratio", "right"],
)
def test_a_maximum_that_follows_the_number_of_ranks_is_told_from_one_that_follows_k(
    maximum, elsewhere, told
):
    """K is R here, so that another K decides."""
    other = None if elsewhere is None else clipped(elsewhere, norm=5.0)
    mine = [clipped(maximum, norm=5.0) for _ in range(2)]
    seen = Seen(*mine, full=clipped(1.0, norm=5.0), kind="applied", other=other)
    seen.candidate.timeline, seen.candidate.places = mine[0].timeline, mine[0].places

    assert codes(ranks._clipped(seen)) == told


def test_without_room_for_another_k_nothing_is_told_of_a_maximum():
    mine = [clipped(2.0, norm=5.0) for _ in range(2)]
    seen = Seen(*mine, full=clipped(1.0, norm=5.0), kind="applied", rows=4)

    assert ranks._clipped(seen) == []


def test_clips_of_other_cycles_are_not_compared():
    mine = [clipped(2.0, norm=5.0), clipped(2.0, norm=5.0)]
    mine[1].places = lambda _: [Place(1, 0, 1, True)]
    seen = Seen(*mine, full=clipped(1.0, norm=5.0), kind="applied")

    assert ranks._clipped(seen) == []


@pytest.mark.parametrize(("other", "told"), [(2 * G, ["EQ506"]), (G, [])], ids=["own", "reduced"])
def test_a_clip_by_value_is_wrong_before_the_reduction(other, told):
    """Of gradients that are the same on all ranks it takes the same everywhere."""
    mine = [clipped(1.0), clipped(1.0)]
    mine[1].steps[0].left = {"w": other}

    assert codes(ranks._clipped(Seen(*mine, kind="applied"))) == told


# ---- weights of ranks ---------------------------------------------------------------------------

PIECES = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def fitted(index):
    mean = PIECES.mean(0)
    fit = solve(PIECES, mean)
    return Attribution(index, index, PIECES, mean, mean, fit, fit, [("w", 16)], ranks=2)


@pytest.mark.parametrize("known", [True, False])
def test_unsynchronised_ranks_show_their_weights_where_pieces_are_known(known):
    own = [PIECES[:2].mean(0), PIECES[2:].mean(0)]
    seen = Seen(*(recording(step(sample=each)) for each in own))
    seen.attributions = [fitted(0)] if known else [fitted(1)]
    (found,) = ranks._apart_at_the_step(seen)

    assert found.code == "EQ502"
    assert ("weights_of_each_rank" in found.evidence) is known
    if known:
        told = torch.tensor(found.evidence["weights_of_each_rank"])
        torch.testing.assert_close(
            told, torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]), atol=1e-9, rtol=0.0
        )


def test_micro_steps_that_count_nothing_are_left_as_they_are():
    """A mean over the ranks of each micro-step has no weights where one of them is empty on all ranks."""
    right = [0.5, 0.0, 0.5, 0.0]

    assert weights._steps_alike(fitted(0), right) == right
    assert weights._steps_alike(fitted(0), [0.1, 0.2, 0.3, 0.4]) == pytest.approx(
        [0.125, 1 / 6, 0.375, 1 / 3]
    )


# ---- rows that interact across ranks ------------------------------------------------------------


class Together:
    """Micro-steps that two ranks compute together: two in a cycle, of which rank 0's micro-batches are counted first.

    Args:
        counts: Of every micro-batch, by label.
    """

    def __init__(self, counts=(), *, together=True):
        self.experiment = SimpleNamespace(together=together)
        self._counts = dict(counts)

    def counts(self):
        return self._counts

    def fits(self, *_):
        return False


def pair(weights_):
    """Return the fit of a gradient that two micro-steps make with these weights."""
    pieces = PIECES[:2]
    made = sum(w * piece for w, piece in zip(weights_, pieces, strict=True))
    fit = solve(pieces, made)
    return Attribution(0, 0, pieces, made, made, fit, fit, [("w", 16)])


def test_micro_steps_of_all_ranks_are_counted_together():
    """What holds nothing gives no weights, nor do counts of more micro-batches than there are pieces."""
    counts = {"tokens": [[1, 2, 3, 4]], "none": [[0, 0, 0, 0]]}
    both = coupling._shares(Together(counts), pair([0.5, 0.5]))
    alone = coupling._shares(Together(counts, together=False), pair([0.5, 0.5]))

    assert both == [[0.5, 0.5], [0.4, 0.6]]
    assert alone == [[0.5, 0.5]]


@pytest.mark.parametrize(
    ("together", "used", "fits"),
    [(True, [0.5, 0.5 + 1e-12], True), (True, [0.5, 0.501], False), (False, [0.5, 0.5], False)],
)
def test_what_ranks_compute_together_has_a_rounding_of_its_own(together, used, fits):
    """No control of one process measured it; a fault is beyond it by far."""
    assert coupling._fits(Together(together=together), pair(used), [0.5, 0.5]) is fits


class Runs:
    """An experiment whose pieces are known alone, of all ranks together, or not at all."""

    def __init__(self, alone, together):
        self.case = SimpleNamespace(accumulation_steps=2, shares=2)
        self.together = False
        self.remembered = {}
        self._found = {False: alone, True: together}

    def attributions(self, _):
        found = self._found[self.together]
        if found is None:
            raise UsageError("this run cannot be made")
        return found


def beyond():
    """Return a fit of what is in no span: neither gradient is made of the pieces."""
    found = pair([0.5, 0.5])
    other = PIECES[3]
    fit = solve(found.pieces, other)
    return Attribution(0, 0, found.pieces, other, other, fit, fit, found.names)


@pytest.mark.parametrize(
    ("alone", "together", "taken_"),
    [
        (None, [pair([0.5, 0.5])], "together"),
        ([beyond()], [pair([0.5, 0.5])], "together"),
        ([beyond()], [beyond()], "alone"),
        ([beyond()], None, "alone"),
    ],
    ids=["alone refused", "together spans", "neither spans", "together refused"],
)
def test_pieces_of_all_ranks_are_taken_where_they_make_the_gradient(
    monkeypatch, alone, together, taken_
):
    monkeypatch.setattr(looks, "attributions_in_company", refuse)
    experiment = Runs(alone, together)
    monkeypatch.setattr(looks.View, "tolerance", lambda *_: 1e-9)

    assert looks.View(experiment).attributions is {"alone": alone, "together": together}[taken_]
    assert experiment.together is (taken_ == "together")


def test_counts_of_nothing_and_of_other_micro_batches_give_no_weights():
    experiment = Runs(None, None)
    counts = {"tokens": [[1, 3]], "none": [[0, 0]], "other": [[1, 2, 3]]}
    experiment.remembered["counts", None] = counts

    assert looks.View(experiment).shares(pair([0.5, 0.5])) == [[0.25, 0.75], [0.5, 0.5], [1.0, 1.0]]


# ---- addends on ranks ---------------------------------------------------------------------------

MAIN, SIDE = (0, (0,)), (0, (1,))


def placed(*by_micro_step):
    """Return gradients of addends by cycle and micro-step."""
    return {
        (0, k): {component: {"w": tensor} for component, tensor in each.items()}
        for k, each in enumerate(by_micro_step)
    }


def reduced(accumulated, gradient):
    alone = placed({MAIN: PIECES[0], SIDE: PIECES[2]}, {MAIN: PIECES[1], SIDE: PIECES[3]})
    parts = addends.Parts(alone, accumulated, {})
    attribution = pair([0.5, 0.5])
    attribution.candidate = gradient
    view = SimpleNamespace(
        attributions=[attribution], cycle_of=lambda matched: matched, tolerance=lambda _: 1e-9
    )
    return addends._reduced(view, parts)


def test_addends_are_taken_as_the_reduction_leaves_them():
    """The mean of two ranks, here, halves each."""
    whole = placed({MAIN: PIECES[0], SIDE: PIECES[2]}, {MAIN: PIECES[1], SIDE: PIECES[3]})
    expected = PIECES[3] / 2
    found = reduced(copy.deepcopy(whole), PIECES.sum(0) / 2)

    torch.testing.assert_close(found.accumulated[0, 1][SIDE]["w"], expected)


@pytest.mark.parametrize(
    ("missing", "gradient"),
    [(True, PIECES.sum(0) / 2), (False, PIECES[0]), (False, 0 * PIECES[0])],
    ids=["an addend is lacking", "no factor makes the gradient", "no gradient"],
)
def test_addends_that_do_not_make_the_gradient_tell_nothing(missing, gradient):
    second = {MAIN: PIECES[1]} if missing else {MAIN: PIECES[1], SIDE: PIECES[3]}

    assert reduced(placed({MAIN: PIECES[0], SIDE: PIECES[2]}, second), gradient) is None


def test_an_addend_that_the_full_batch_lacks_is_not_called_coupled():
    both = placed({MAIN: PIECES[0]}, {MAIN: PIECES[1]})
    view = SimpleNamespace(
        attributions=[pair([0.5, 0.5])],
        chosen=(),
        cycle_of=lambda matched: matched,
        tolerance=lambda _: 1e-9,
        experiment=SimpleNamespace(remembered={("addends", ()): addends.Parts(both, both, {})}),
    )

    assert not addends.coupled_addends(view, lambda *_: [[0.5, 0.5]])


@pytest.mark.parametrize(("told", "predictions"), [("K", 2), ("K, divided by R again", 1)])
def test_a_mean_that_the_ranks_divide_once_more_is_no_double_division_by_k(
    monkeypatch, told, predictions
):
    """Where K and the number of ranks are the same, another K tells which of them it was."""
    tried = {}
    monkeypatch.setattr(weights, "equal_parts_of", lambda _: told)
    monkeypatch.setattr(
        weights, "hypotheses", lambda _, code, given, **__: tried.setdefault(code, given) and []
    )
    for name in ("_again_over_ranks", "_geometric", "_whole", "_clipped_by_hand", "_hidden"):
        monkeypatch.setattr(weights, name, lambda _: [])
    monkeypatch.setattr(weights.wrong_denominator, "suspect", lambda _: [])
    monkeypatch.setattr(weights, "factor_of", lambda _: None)
    monkeypatch.setattr(weights, "undecided", lambda _: [])
    seen = Seen(recording(step()), recording(step()))
    seen.divergent, seen.every, seen.places, seen.names = [], [], [], None
    seen.counts = dict

    assert weights._in_all(seen) == []
    assert len(tried["EQ102"]) == predictions


# ---- what ranks take ----------------------------------------------------------------------------


def test_samples_that_several_ranks_take_are_looked_for_in_every_step_that_is_none_of_the_full_batch():
    def of_rank(*samples):
        steps = [step(i, matched=None) for i in range(len(samples))]
        for each, taken_then in zip(steps, samples, strict=True):
            each.samples = frozenset(taken_then)
        return Recording("candidate", steps=steps)

    ranks_of = [of_rank({1, 2}, {5, 6}), of_rank({3, 4}, {6, 7})]
    candidate = Recording("candidate", steps=ranks_of[0].steps, ranks=ranks_of)
    experiment = SimpleNamespace(wants={"dataset"}, case=SimpleNamespace(shares=2))
    told = doubts._taken_twice(experiment, candidate)

    assert (told["optimizer_step"], told["samples_of_several_ranks"]) == (1, "1 of 3")


@pytest.mark.parametrize(("taken_by_ranks", "orders"), [([2, 0], [[2, 1, 0]]), ([2, 1], None)])
def test_single_micro_batches_of_ranks_hold_what_a_sampler_dealt_out(taken_by_ranks, orders):
    """Not where ranks take other samples than the full batch."""
    experiment = SimpleNamespace(
        together=False,
        _dealt=lambda *_: taken_by_ranks,
        reference=lambda: Recording("reference", fetched=[[(0, 0), (0, 2)]]),
        _promoted=SimpleNamespace(total=3),
    )

    assert SubjectExperiment._orders_of_ranks(experiment) == orders


# ---- what ranks send ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "fix"), [("ddp", traffic.BY_HAND), ("fsdp", traffic.SHARDED), ("pipeline", None)]
)
def test_a_reduction_too_many_is_told_though_it_cannot_be_left_out(strategy, fix):
    """A loop may not survive the call that would prove it; stages of a pipeline have to send each time."""
    sent = [Collective("all_reduce", 8, "default", at) for at in (11, 21)]
    own = step()
    own.backwards, own.at = 2, 30
    mine = Recording("native_candidate", steps=[own], collectives=sent)
    mine.backwards = [Backward(i, i + 1, 1.0, 1.0, "MeanBackward0") for i in range(2)]
    mine.backwards = [replace(each, at=10 * (i + 1)) for i, each in enumerate(mine.backwards)]
    whole = Recording("native_candidate", ranks=[mine])
    experiment = SimpleNamespace(
        case=SimpleNamespace(strategy=strategy, accumulation_steps=2),
        native=lambda _: whole,
        judgement=lambda *_, **__: refuse(),
    )
    found = traffic.redundant(experiment)

    assert (found and found["fix"]) == fix
    assert found is None or (found["count"], found["minimum_count"]) == (2, 1)


@pytest.mark.parametrize(
    ("asked", "own", "roundoff"),
    [
        ("bfloat16", "float32", 2.0**-8),
        ("bfloat16", "bfloat16", 0.0),
        ("float32", "bfloat16", 0.0),
        ("", "float32", 0.0),
    ],
)
def test_a_dtype_that_only_ranks_compute_in_has_its_own_noise(asked, own, roundoff):
    """What one process computes with has no wrapper, whose policy may be coarser."""
    seen = Seen(*(Recording("candidate", asked=asked) for _ in range(2)))
    seen.experiment.crew = object()
    seen.experiment.candidate = lambda: seen.candidate
    seen.experiment.reference = lambda: Recording("reference", dtype=own)

    assert precision._of_ranks(seen.experiment) == roundoff


def test_without_the_parameters_that_a_run_starts_from_they_are_no_piece():
    """A gradient that no sum of pieces makes may be made by them too, where they are known."""
    pieces = [step(sample=PIECES[k]) for k in (0, 1)]
    target = step(sample=PIECES[2])
    known = attribute(step(sample=PIECES[2]), target, pieces, {"w": PIECES[2]})
    unknown = attribute(step(sample=PIECES[2]), target, pieces, sampled(None))

    assert known.weights_piece is not None
    assert unknown.weights_piece is None


# ---- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elsewhere", "per_rank"), [(2, True), (3, False), (None, True)], ids=["R", "K", "refused"]
)
def test_a_scheduler_that_steps_twice_follows_the_ranks_unless_another_k_tells(elsewhere, per_rank):
    other = None if elsewhere is None else recording(step(), kinds=["scheduler"] * elsewhere)
    seen = Seen(recording(step()), recording(step()), other=other)

    assert schedule._per_rank(seen, {2}, 1) is per_rank


@pytest.mark.parametrize(
    ("rate", "by_steps"), [(0.1, False), (0.2, True), (None, False)], ids=["R", "K", "refused"]
)
def test_a_horizon_follows_the_ranks_unless_another_k_tells(rate, by_steps):
    other = None if rate is None else recording(step())
    if other is not None:
        other.steps[0].learning_rates = [rate]
    seen = Seen(recording(step()), recording(step()), other=other)

    assert schedule._by_steps(seen, [[0.1]]) is by_steps


def test_a_horizon_that_the_loop_refuses_is_not_told():
    seen = Seen(recording(step(), step(1)), recording(step(), step(1)))

    assert schedule._divided_by_ranks(seen, 0) == []


def test_a_loss_of_which_one_addend_alone_has_gradients_is_not_taken_apart(monkeypatch):
    """It is a sum, and the other one reaches no parameter."""
    alone = Recording("pieces", backwards=[Backward(0, 1, 1.0, 1.0, "AddBackward0", addends=2)])
    view = SimpleNamespace(
        chosen=(),
        cycles={},
        experiment=SimpleNamespace(remembered={}, pieces_recording=lambda _: alone, crew=None),
    )
    monkeypatch.setattr(addends, "_taken", lambda *_: placed({MAIN: G}, {MAIN: G}))

    assert addends.addend_parts(view) is None


# ---- stages -------------------------------------------------------------------------------------


def staged(scales, *, steps=2, size=4, other=None, rows=24, twist=0.0):
    """Return the accumulated run of a pipeline whose stages have these multiples of the full batch's gradients.

    Args:
        scales: One for each stage, with a parameter of its own.
        steps: K.
        size: R.
        other: The multiples at another K; None if the loop refuses it.
        rows: Of every full batch.
        twist: Of another gradient, in every stage, relative to its own.
    """
    right = [vector(3.0, 4.0) * (i + 1) for i in range(len(scales))]
    turned = [vector(-4.0, 3.0) * (i + 1) * twist for i in range(len(scales))]
    made = [scale * (a + b) for scale, a, b in zip(scales, right, turned, strict=True)]
    reference, candidate = torch.cat(right), torch.cat(made)
    pieces = torch.stack([0.5 * reference, 0.5 * reference])
    fits = solve(pieces, reference), solve(pieces, candidate)
    names = [(f"stage{i}.w", 2) for i in range(len(scales))]
    found = Attribution(0, 0, pieces, reference, candidate, *fits, names)
    there = None
    if other is not None:
        measured = {f"stage{i}.w": off(scale - 1.0) for i, scale in enumerate(other)}
        there = Recording("candidate", steps=[step(gradients=measured)])
    return SimpleNamespace(
        steps=steps,
        divergent=[found],
        attributions=[found],
        cycle_of=lambda matched: matched,
        tolerance=lambda _: 1e-9,
        experiment=SimpleNamespace(
            case=SimpleNamespace(world_size=size, shares=1),
            data=SimpleNamespace(rows=[rows]),
            at=refuse if there is None else lambda _: there,
        ),
    )


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (staged([0.125, 0.25, 0.5, 1.0]), "EQ102"),
        (staged([8.0, 4.0, 2.0, 1.0]), "EQ101"),
        (staged([9.0, 3.0, 1.0], steps=2, size=3), "EQ504"),
        (staged([4.0, 2.0, 1.0], size=2, other=[9.0, 3.0, 1.0]), "EQ101"),
        (staged([4.0, 2.0, 1.0], size=2, other=[4.0, 2.0, 1.0]), "EQ504"),
        (staged([4.0, 2.0, 1.0], size=2), None),
        (staged([4.0, 2.0, 1.0], size=2, other=[9.0, 3.0, 1.0], rows=2), None),
        (staged([2.0, 2.0, 1.0]), None),
        (staged([4.0, 0.5, 1.0]), None),
        (staged([5.0, 3.0, 1.0]), None),
        (staged([8.0, 4.0, 2.0, 1.0], twist=0.1), None),
        (staged([8.0, 4.0, 2.0], size=1), None),
    ],
    ids=[
        "divided by K",
        "multiplied by K",
        "multiplied by R",
        "K is R, and the factors follow K",
        "K is R, and the factors follow R",
        "K is R, another K refused",
        "K is R, too few rows for another K",
        "one power",
        "up and down",
        "no powers",
        "other gradients",
        "one rank",
    ],
)
def test_factors_that_grow_from_stage_to_stage_are_told(seen, code):
    """What a stage passes on reaches the one before it once, the one before that twice; else nothing is said."""
    found = stages.suspect(seen)

    assert codes(found) == ([code] if code else [])
    for each in found:
        (put_right,) = each.variants
        assert all(factor != 1.0 for way in put_right for factor in way._factors[0])


# ---- reductions that are left out ---------------------------------------------------------------


def left_out(*apart, tail=True):
    """Return two ranks' runs whose gradients differ after these of three steps; the last cycle is incomplete."""
    both = []
    for rank in range(2):
        steps = [
            step(i, sample=2 * G if rank and i in apart else G) for i in range(3 if tail else 2)
        ]
        for i, each in enumerate(steps):
            each.first_backward, each.backwards = 2 * i, 2 * i + (1 if i == 2 else 2)
        both.append(recording(*steps))
    return Seen(*both)


@pytest.mark.parametrize(
    ("seen", "is_told"),
    [
        (left_out(2), True),
        (left_out(0, 2), False),
        (left_out(0, tail=False), False),
    ],
    ids=["after the tail", "after a complete cycle too", "no tail"],
)
def test_a_reduction_that_the_incomplete_cycle_lacks_is_told(seen, is_told):
    """The step at the end of the loader, behind a micro-batch under no_sync."""
    assert bool(ranks._tails_only(seen, 1e-9)) is is_told


def test_a_horizon_made_by_r_or_by_k_is_not_told_where_another_k_is_refused():
    seen = Seen(recording(step()), recording(step()))
    seen.names = None

    assert schedule._made_by_steps(seen) is False


@pytest.mark.parametrize("elsewhere", [4, 8], ids=["R", "K"])
def test_a_horizon_is_made_by_the_number_of_ranks_unless_another_k_makes_another(elsewhere):
    """K and R are both 2 here: at K = 3 the schedule is made with the same number, or it is not."""
    here, there = recording(step()), recording(step())
    here.schedulers = [{"scheduler": "LinearLR", "arguments": {"total_iters": 4}}]
    there.schedulers = [{"scheduler": "LinearLR", "arguments": {"total_iters": elsewhere}}]
    seen = Seen(recording(step()), recording(step()), other=there)
    seen.candidate.schedulers = here.schedulers

    assert schedule._made_by_steps(seen) is (elsewhere != 4)
