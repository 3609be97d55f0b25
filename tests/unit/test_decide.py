"""Every way in which a case can end without a plain verdict, each by a loop that ends so."""

from __future__ import annotations

import re

import pytest

from equivcheck.case import Case
from equivcheck.decide import run_case
from equivcheck.errors import UsageError
from equivcheck.subject import load_subject

SUBJECT = """
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

ROWS = [8, 8]

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, 4, generator=generator), torch.arange(rows) % 2) for rows in ROWS]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, (x, y) in enumerate(loader):
        loss = F.cross_entropy(model(x), y)
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""
LOSS = "loss = F.cross_entropy(model(x), y)"
BACKWARD = "(loss / accumulation_steps).backward()"
STEP = "            optimizer.step()\n"
UNDIVIDED = (BACKWARD, "loss.backward()")


@pytest.fixture
def decide(tmp_path):
    """Return a function that decides the loop above with some lines replaced."""

    def run(*replaced, accumulation_steps=2, **fields):
        source = SUBJECT
        for line, other in replaced:
            assert line in source
            source = source.replace(line, other)
        path = tmp_path / "subject.py"
        path.write_text(source, encoding="utf-8")
        return run_case(load_subject(str(path)), Case(str(path), accumulation_steps, **fields))

    return run


def told(case):
    causes = [f"{each['code']} {each['status']}" for each in case["causes"]]
    return " ".join([case["verdict"], *causes])


def test_dropout_is_switched_off_and_said_so(decide):
    case = decide(("nn.Tanh()", "nn.Tanh(), nn.Dropout()"))

    assert told(case) == "equivalent"
    assert case["notes"] == ["dropout was switched off in every run"]


@pytest.mark.parametrize(
    ("begin", "where"),
    [("def batches():\n", "before its first run"), ("loader, accumulation_steps):\n", "reference")],
)
def test_time_that_runs_out_is_told_with_what_ran(tmp_path, begin, where):
    """Batches are read before the first role begins."""
    path = tmp_path / "subject.py"
    assert begin in SUBJECT
    path.write_text(SUBJECT.replace(begin, f"{begin}    while True: pass\n"), encoding="utf-8")
    case = run_case(load_subject(str(path)), Case(str(path), 2), timeout=0.5)

    assert case["verdict"] == "error"
    assert case["error"]["where"].endswith(where)


def test_batches_that_cannot_be_cut_are_an_error_of_the_call(decide):
    with pytest.raises(UsageError, match="accumulation_steps=9"):
        decide(accumulation_steps=9)


def test_one_full_batch_is_enough(decide):
    assert told(decide(("[8, 8]", "[8]"), UNDIVIDED)) == "divergent EQ101 proved"


def test_a_loop_that_never_steps_when_accumulating_diverges(decide):
    case = decide(("== 0:", "== 0 and accumulation_steps == 1:"))

    assert case["verdict"] == "divergent"
    assert "0 optimizer steps, not 2" in case["headline"]


def test_an_accumulated_gradient_that_is_inf_is_invalid(decide):
    case = decide((BACKWARD, "(loss / (accumulation_steps % 2)).backward()"))

    assert case["verdict"] == "invalid"
    assert case["headline"].startswith("not-finite: gradients of optimizer_step 0 are inf or nan")


def test_a_batch_that_holds_nan_is_named(decide):
    """The gradients of the full batch are then nan by no fault of the loop."""
    drawn = "torch.randn(rows, 4, generator=generator)"
    case = decide((drawn, f"{drawn}.log()"))

    assert case["verdict"] == "invalid"
    assert re.fullmatch(r"batch 0 of batches\(\) holds 1\d inf or nan in 0", case["because"])
    assert "torch.nan_to_num" in case["fix"]


RESUMED = """    import pathlib
    kept = pathlib.Path(__file__).with_suffix(".pt")
    if kept.exists():
        return
    kept.write_text("all of it")
    optimizer ="""


def test_a_loop_that_finds_its_own_checkpoint_is_told_from_a_random_one(decide):
    case = decide(("    optimizer =", RESUMED))

    assert (case["verdict"], case["causes"]) == ("inconclusive", [])
    assert case["headline"] == (
        "other-steps: the full_batch run again made 0 optimizer steps, not 2"
    )


STEPPED = f"{STEP}            optimizer.zero_grad()\n"


def logging(value):
    """Return the replacement with which the loop yields a loss at every optimizer step."""
    return (STEPPED, f"{STEPPED}            yield {value}\n")


def test_what_is_logged_as_nan_in_both_runs_is_no_difference(decide):
    case = decide(logging("float('nan')"))

    note = "logged loss of optimizer_step 0 is not finite in both runs, as are 1 more"
    assert case["verdict"] == "equivalent"
    assert case["notes"] == [note]


def test_gradients_are_judged_beside_a_log_of_nan(decide):
    case = decide(logging("float('nan')"), UNDIVIDED)

    assert [each["code"] for each in case["causes"]] == ["EQ101"]


@pytest.mark.parametrize(
    ("condition", "where"),
    [("accumulation_steps > 1", ""), ("accumulation_steps == 1", " in the full batch")],
)
def test_a_log_of_nan_in_one_run_is_named(decide, condition, where):
    case = decide(
        logging(f"float('nan') if {condition} and (index or accumulation_steps > 1) else 0.0")
    )

    (cause,) = case["causes"]
    found = f"logged loss of optimizer_step {1 if where else 0} is not finite{where}"
    assert (cause["code"], cause["status"]) == ("EQ701", "proved")
    assert cause["evidence"]["found"] == found
    assert found in case["headline"]
    assert "relative" not in cause["evidence"]
    assert "None" not in str(cause)


def test_a_log_of_nan_stands_behind_a_wrong_gradient(decide):
    case = decide(logging("float('nan') if accumulation_steps > 1 else 0.0"), UNDIVIDED)

    assert [each["code"] for each in case["causes"]] == ["EQ101", "EQ701"]


def test_float64_is_not_blamed_for_a_gradient_that_is_inf_as_written(decide):
    case = decide((BACKWARD, "(loss / 0.0).backward()"))

    assert case["verdict"] == "invalid"
    assert case["notes"] == []


def test_code_that_raises_as_written_only_is_an_error(decide):
    case = decide((LOSS, f"{LOSS}\n        assert loss.dtype == torch.float64"))

    assert case["verdict"] == "error"
    assert any(note.startswith("as written the code raises") for note in case["notes"])


BY_PLACE = (
    LOSS,
    "loss = (F.cross_entropy(model(x), y, reduction='none') * torch.arange(len(y))).mean()",
)
SEEDED = (
    LOSS,
    "loss = (F.cross_entropy(model(x), y, reduction='none') * torch.rand(len(y))).mean()",
)


@pytest.mark.parametrize(
    ("loss", "headline"),
    [(BY_PLACE, "order-dependent"), (SEEDED, "EQ602")],
    ids=["by place", "seeded noise"],
)
def test_rows_that_change_with_their_place_decide_nothing(decide, loss, headline):
    """A repeat in order is bitwise equal; another seed tells noise from order."""
    case = decide(loss)

    assert case["verdict"] == "inconclusive"
    assert case["headline"].startswith(headline)


def test_random_draws_that_cannot_be_keyed_leave_the_case_as_it_is(decide):
    """This loop compares them with those of a generator of its own, and so refuses all others."""
    looks = (
        "own = torch.Generator()\n        own.set_state(torch.get_rng_state())\n"
        "        noise = torch.rand(len(y))\n"
        "        assert torch.equal(noise, torch.rand(len(y), generator=own))\n"
        "        loss = (F.cross_entropy(model(x), y, reduction='none') * noise).mean()"
    )
    case = decide((LOSS, looks))

    assert told(case) == "inconclusive EQ602 proved"
    assert not any("the same for each sample" in note for note in case["notes"])


def test_a_loop_that_insists_on_its_seed_is_decided_all_the_same(decide):
    insists = "    assert torch.initial_seed() == 1\n    optimizer ="
    case = decide(UNDIVIDED, ("    optimizer =", insists))

    assert told(case) == "divergent EQ101 proved"


def test_micro_batches_that_cannot_be_run_alone_have_the_weights_of_what_their_backwards_add(
    decide,
):
    alone = "    assert accumulation_steps > 1 or len(loader) <= len(ROWS)\n    optimizer ="
    case = decide(UNDIVIDED, ("    optimizer =", alone))

    assert told(case) == "divergent EQ101 proved"
    scale = [
        w / v
        for v, w in zip(
            case["attribution"]["reference_weights"],
            case["attribution"]["candidate_weights"],
            strict=True,
        )
    ]
    assert scale == pytest.approx([case["accumulation_steps"]] * len(scale))


def test_without_weights_of_any_kind_a_difference_is_not_explained(decide):
    """Micro-batches are refused alone, and of one of them there is no backward in the accumulated run either."""
    alone = "    assert accumulation_steps > 1 or len(loader) <= len(ROWS)\n    optimizer ="
    taken = f"if accumulation_steps == 1 or index % 2:\n            {BACKWARD}"
    case = decide((BACKWARD, taken), ("    optimizer =", alone))

    assert told(case) == "divergent EQ000 suspected"
    assert case["attribution"] is None
    assert case["notes"] == ["no attribution: train-raised: AssertionError"]


ASSERTED = f"{LOSS}\n        assert loss.dtype == torch.float32"


def test_as_written_a_gradient_that_is_inf_in_the_full_batch_is_invalid(decide):
    case = decide((LOSS, ASSERTED), (BACKWARD, "(loss / 0.0).backward()"))

    assert case["verdict"] == "invalid"
    assert case["headline"].endswith("in the full batch")


def test_as_written_a_gradient_that_is_inf_when_accumulated_is_invalid(decide):
    case = decide((LOSS, ASSERTED), (BACKWARD, "(loss / (accumulation_steps % 2)).backward()"))

    assert case["verdict"] == "invalid"
    assert case["headline"].endswith("when accumulated")


def test_as_written_rows_that_change_with_their_place_decide_nothing(decide):
    case = decide((LOSS, f"{BY_PLACE[1]}\n        assert loss.dtype == torch.float32"))

    assert (case["judged"], case["verdict"]) == ("native", "inconclusive")
    assert case["headline"].startswith("order-dependent")


def test_noise_as_large_as_a_fault_decides_nothing(decide):
    """Sums of 1024 roundings of bfloat16 may lose everything."""
    low = "    model.to(torch.bfloat16)\n    optimizer ="
    loss = "loss = model(x.bfloat16()).float().square().mean()\n        "
    case = decide(
        ("[8, 8]", "[1024]"),
        ("    optimizer =", low),
        (LOSS, f"{loss}assert model[0].weight.dtype == torch.bfloat16"),
        accumulation_steps=1024,
    )

    assert (case["judged"], told(case)) == ("native", "inconclusive")
    assert case["headline"].startswith("too-coarse")


def test_an_operator_without_float64_leaves_long_sums_too_coarse(decide):
    """What float32 computes decides nothing behind sums of so many terms."""
    grouped = (
        "ends = torch.tensor([len(x)], dtype=torch.int32)\n"
        "        mixed = torch._grouped_mm(x.bfloat16(), MIXED.bfloat16(), offs=ends).to(x.dtype)\n"
        "        loss = F.cross_entropy(model(x + 0.1 * mixed), y[:, 0])"
    )
    case = decide(
        ("randn(rows, 4,", "randn(rows, 8,"),
        ("nn.Linear(4, 6)", "nn.Linear(8, 6)"),
        ("torch.arange(rows) % 2)", "(torch.arange(rows) % 2)[:, None].repeat(1, 30_000))"),
        ("ROWS =", "MIXED = torch.eye(8)[None]\nROWS ="),
        (LOSS, grouped),
    )

    assert told(case) == "inconclusive"
    assert case["lowered"] == {"aten._grouped_mm.default": "float32"}
    assert case["headline"].startswith("too-coarse")


class Kept:
    """An object whose runs differ in one thing, the full batch's aside.

    Args:
        what: loss, rate, idle (the rate of a group that has no gradients) or log.
    """

    def __init__(self, what):
        self.what = what
        self.runs = 0

    def build(self):
        from torch import nn

        return nn.Linear(4, 1)

    def batches(self):
        import torch

        return [torch.randn(8, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def train(self, model, loader, accumulation_steps):
        import torch

        self.runs += accumulation_steps > 1
        factor = 1.0 + self.runs / 8
        rate = 0.1 * (factor if self.what == "rate" else 1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        if self.what == "idle":
            optimizer.add_param_group({"params": [torch.zeros(1)], "lr": 0.1 * factor})
        logged = []
        total = 0.0
        for index, x in enumerate(loader):
            loss = model(x).square().mean() / accumulation_steps
            (loss * (factor if self.what == "loss" else 1.0)).backward()
            total += loss.item()
            if (index + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()
                logged.append(total * (factor if self.what == "log" else 1.0))
                total = 0.0
        return logged


class Asserted(Kept):
    """Such an object, which asserts the precision that it is written in."""

    def train(self, model, loader, accumulation_steps):
        import torch

        assert next(model.parameters()).dtype == torch.float32
        return super().train(model, loader, accumulation_steps)


def test_an_object_that_differs_from_itself_decides_nothing_as_written_either():
    case = run_case(load_subject(Asserted("log")), Case("Asserted", 2))

    assert (case["judged"], case["verdict"]) == ("native", "inconclusive")
    assert case["headline"].endswith("differs from itself, logged losses")


@pytest.mark.parametrize(
    ("what", "differs"),
    [
        ("loss", "gradients of optimizer_step 0"),
        ("rate", "of optimizer_step 0"),
        ("idle", "learning rates of optimizer_step 0"),
        ("log", "logged losses"),
    ],
)
def test_an_object_that_differs_from_itself_decides_nothing(what, differs):
    case = run_case(load_subject(Kept(what)), Case("Kept", 2))

    assert case["verdict"] == "inconclusive"
    assert case["headline"].startswith("state-survives: the accumulated run differs from itself")
    assert case["headline"].endswith(differs)


OVERFLOWS = """
import torch

def build():
    return torch.nn.Linear(1, 1, bias=False)

def batches():
    signs = torch.tensor([1.0] * 4 + [-0.99] * 4)
    return [(torch.full((8, 1), 100.0), signs) for _ in range(3)]

def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
    for index, (x, signs) in enumerate(loader):
        with torch.autocast("cpu", dtype=torch.float16):
            out = model(x)[:, 0]
        loss = (out.float() * signs).mean() / accumulation_steps
        scaler.scale(loss).backward()
        if (index + 1) % accumulation_steps == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
"""


def overflowing(tmp_path, *replaced):
    """Return the case of a loop whose micro-batches have gradients that cancel in the full batch, beyond float16."""
    source = OVERFLOWS
    for line, other in replaced:
        assert line in source
        source = source.replace(line, other)
    path = tmp_path / "subject.py"
    path.write_text(source, encoding="utf-8")
    return run_case(load_subject(str(path)), Case(str(path), 2))


def test_a_step_that_only_the_accumulated_run_leaves_out_is_told(tmp_path):
    """In float64, which does not overflow, nothing differs."""
    case = overflowing(tmp_path)

    assert told(case) == "divergent EQ404 proved"
    assert case["headline"] == "EQ404 skipped-step"
    assert case["causes"][0]["evidence"]["role"] == "native_candidate"


BY_HAND = (
    ("scaler.scale(loss)", "(loss * 2.0**11)"),
    ("scaler.step(optimizer)", "optimizer.step()"),
    ("            scaler.update()\n", ""),
)


def test_a_gradient_that_is_nan_as_written_agrees_with_nothing(tmp_path):
    """One micro-batch gives inf, the other -inf: their sum is no number, in a loop that float64 finds right."""
    case = overflowing(tmp_path, *BY_HAND)

    assert (case["judged"], told(case)) == ("native", "invalid")
    assert case["headline"].endswith("when accumulated")


def test_a_fault_is_named_beside_gradients_that_overflow_as_written(tmp_path):
    """Of what is no number no error is told, kind of module by kind of module."""
    case = overflowing(tmp_path, (" / accumulation_steps", ""), *BY_HAND)

    assert told(case) == "divergent EQ101 proved"
    (row,) = case["precision_by_module"]
    assert row["full_batch"] is not None
    assert row["accumulated"] is None
