"""Scripts that know nothing of equivcheck: right ones are equivalent, every planted fault is named and proved."""

from __future__ import annotations

import pytest

from tests.scripts.conftest import causes, command

ACCUMULATED = ("--batch-size", 4, "--accum", 4)
slow = pytest.mark.slow


def told(entry):
    return entry["headline"], causes(entry), entry["notes"]


def test_a_right_script_is_equivalent(decide):
    """A plain loop with a shuffling loader, AdamW, clipping, a schedule, dropout and a tail."""
    entry = decide(command("classify"), command("classify", *ACCUMULATED))

    assert entry["verdict"] == "equivalent", told(entry)
    assert (entry["accumulation_steps"], entry["world_size"]) == (4, 1)
    assert entry["detection_power"] < 1e-9
    assert entry["optimizer_steps_seen"] == {"full_batch": 6, "accumulated": 6}
    assert "dropout was switched off in every run" in entry["notes"]


@pytest.mark.parametrize("steps", [2, pytest.param(4, marks=slow)])
def test_a_script_that_trains_for_longer_is_ended(decide, steps):
    """Every role sees the same optimizer steps, and what comes after them is waited for by none."""
    entry = decide(command("classify"), command("classify", *ACCUMULATED), optimizer_steps=steps)

    assert entry["verdict"] == "equivalent", told(entry)
    assert entry["optimizer_steps_seen"] == {"full_batch": steps, "accumulated": steps}
    assert entry["ended_after_optimizer_steps"] == steps


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        ("missing-division", "EQ101"),
        ("zero-in-cycle", "EQ301"),
        pytest.param("double-division", "EQ102", marks=slow),
        pytest.param("tail-divisor", "EQ105", marks=slow),
        pytest.param("wrong-denominator", "EQ104", marks=slow),
        pytest.param("never-zeroed", "EQ302", marks=slow),
        pytest.param("step-in-cycle", "EQ303", marks=slow),
        pytest.param("dropped-tail", "EQ304", marks=slow),
        pytest.param("clip-in-cycle", "EQ306", marks=slow),
        pytest.param("scheduler-in-cycle", "EQ307", marks=slow),
        pytest.param("horizon", "EQ308", marks=slow),
        ("batch-norm", "EQ201"),
    ],
)
def test_a_planted_fault_is_proved(decide, mistake, code):
    fault = ("--mistake", mistake)
    entry = decide(command("classify", *fault), command("classify", *ACCUMULATED, *fault))

    assert entry["verdict"] == "divergent", told(entry)
    assert causes(entry) == [(code, "proved")], told(entry)


@pytest.mark.parametrize(
    ("mistake", "step"),
    [("shuffle-by-batch-size", 0), pytest.param("shuffle-later", 3, marks=slow)],
)
def test_other_samples_are_no_divergence(decide, mistake, step):
    """A shuffle that depends on the batch size gives other samples to the same optimizer step."""
    fault = ("--mistake", mistake)
    entry = decide(command("classify", *fault), command("classify", *ACCUMULATED, *fault))

    assert entry["verdict"] == "invalid", told(entry)
    assert causes(entry) == [("EQ601", "proved")]
    assert entry["causes"][0]["optimizer_step"] == step


def test_an_unseeded_script_cannot_be_decided(decide):
    fault = ("--mistake", "unseeded")
    entry = decide(command("classify", *fault), command("classify", *ACCUMULATED, *fault))

    assert entry["verdict"] == "inconclusive", told(entry)
    assert causes(entry) == [("EQ602", "proved")]


def test_a_script_that_raises_shows_its_own_traceback(decide):
    fault = ("--mistake", "crash")
    entry = decide(command("classify", *fault), command("classify", *ACCUMULATED, *fault))

    assert entry["verdict"] == "error"
    assert entry["error"]["exit_code"] == 3
    assert entry["error"]["message"] == "script-raised: RuntimeError: the disk is full"
    assert entry["error"]["traceback"].count("File ") == 2
    assert 'in main\n    raise RuntimeError("the disk is full")' in entry["error"]["traceback"]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_right_script_in_mixed_precision_is_equivalent(decide, amp):
    """Sentences of unequal length, weighted by their tokens; with a loss scale under float16."""
    entry = decide(
        command("tokens", "--amp", amp),
        command("tokens", "--amp", amp, "--batch-size", 2, "--accum", 4),
    )

    assert entry["verdict"] == "equivalent", told(entry)
    assert entry["accumulation_steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "amp", "code"),
    [
        ("mean-of-means", "none", "EQ103"),
        ("mean-of-means", "bf16", "EQ103"),
        ("sum-of-means", "none", "EQ101"),
        ("one-token-too-many", "none", "EQ104"),
        ("scaler", "fp16", "EQ402"),
    ],
)
def test_a_fault_in_the_weights_of_tokens_is_proved(decide, mistake, amp, code):
    fault = ("--amp", amp, "--mistake", mistake)
    entry = decide(
        command("tokens", *fault), command("tokens", *fault, "--batch-size", 2, "--accum", 4)
    )

    assert entry["verdict"] == "divergent", told(entry)
    assert causes(entry) == [(code, "proved")], told(entry)


@pytest.mark.slow
def test_a_coarse_buffer_is_a_loss_of_precision(decide):
    fault = ("--mistake", "low-precision")
    entry = decide(
        command("tokens", *fault), command("tokens", *fault, "--batch-size", 2, "--accum", 4)
    )

    assert (entry["verdict"], causes(entry)) == ("precision-loss", [("EQ401", "proved")])


@pytest.mark.parametrize(
    ("mistake", "code"),
    [
        pytest.param(None, None, marks=slow),
        ("auxiliary-undivided", "EQ106"),
        pytest.param("penalty-undivided", "EQ107", marks=slow),
        pytest.param("penalty-by-itself", "EQ107", marks=slow),
    ],
)
def test_one_addend_with_a_wrong_factor_is_told_from_the_others(decide, mistake, code):
    """A loss of three addends: the main one, an auxiliary one, a penalty that is the same in every micro-batch."""
    fault = ("--mistake", mistake) if mistake else ()
    entry = decide(command("multitask", *fault), command("multitask", *ACCUMULATED, *fault))

    assert causes(entry) == ([(code, "proved")] if code else []), told(entry)
    assert entry["verdict"] == ("divergent" if code else "equivalent")
    assert entry["warnings"] == []


@pytest.mark.parametrize(
    ("mistake", "rule"),
    [
        ("log-divided-twice", "divided by accumulation_steps once too often"),
        pytest.param("log-summed", "summed, not averaged", marks=slow),
    ],
)
def test_a_printed_loss_that_is_a_multiple_of_the_true_one_is_wrong(decide, mistake, rule):
    fault = ("--mistake", mistake)
    entry = decide(command("multitask", *fault), command("multitask", *ACCUMULATED, *fault))

    assert (entry["verdict"], causes(entry)) == ("divergent", [("EQ701", "proved")]), told(entry)
    assert entry["causes"][0]["evidence"]["rule"] == rule
    assert entry["headline"].startswith("EQ701 logged-loss: printed losses differ by")


@slow
@pytest.mark.parametrize("expect", [(), ("EQ701",)], ids=["", "expected"])
def test_a_printed_loss_of_the_last_micro_batch_is_a_warning(decide, expect):
    """Many print it and know it; who declares the cause takes the printed number for the log."""
    fault = ("--mistake", "log-last")
    entry = decide(
        command("multitask", *fault), command("multitask", *ACCUMULATED, *fault), expect=expect
    )

    if expect:
        assert (entry["verdict"], causes(entry)) == ("expected", [("EQ701", "proved")])
        return
    assert (entry["verdict"], causes(entry)) == ("equivalent", [])
    [warning] = entry["warnings"]
    assert warning["code"] == "EQ701"
    assert warning["evidence"]["rule"] == "the last backward's loss, times accumulation_steps"


@slow
@pytest.mark.parametrize("mistake", [None, "missing-division"])
@pytest.mark.parametrize(
    "style",
    ["two-networks", "closure", "time-first", "checkpointed", "images", "graphs", "packed"],
)
def test_styles_other_than_one_forward_on_rows_and_one_step(decide, style, mistake):
    """A generator and its judge, closures that are evaluated again, models that take time first, checkpoints.

    And samples that are no rows of one tensor: a list of images, graphs joined into one, packed sequences.
    """
    options = ("--style", style, *(("--mistake", mistake) if mistake else ()))
    entry = decide(command("styles", *options), command("styles", *ACCUMULATED, *options))

    assert causes(entry) == ([("EQ101", "proved")] if mistake else []), told(entry)
    assert entry["verdict"] == ("divergent" if mistake else "equivalent")
    assert entry["accumulation_steps"] == 4


RESUMES = """
import pathlib, sys, torch

kept = pathlib.Path(sys.argv[1])
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
start = int(kept.read_text()) if kept.exists() else 0
for step in range(start, 3):
    model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    kept.write_text(str(step + 1))
"""


@slow
def test_a_script_that_resumes_from_its_own_checkpoint_is_told_apart_from_a_random_one(
    decide, tmp_path
):
    path = tmp_path / "resumes.py"
    path.write_text(RESUMES, encoding="utf-8")
    line = command(path, tmp_path / "kept")
    entry = decide(line, line)

    assert (entry["verdict"], causes(entry)) == ("inconclusive", []), told(entry)
    assert entry["headline"].startswith("other-steps: the full_batch run again made 0 optimizer")
    assert "checkpoint" in entry["because"]


def test_a_script_that_finds_nothing_left_to_train_is_told_of_its_checkpoint(decide, tmp_path):
    path = tmp_path / "resumes.py"
    path.write_text(RESUMES, encoding="utf-8")
    (tmp_path / "kept").write_text("3", encoding="utf-8")
    line = command(path, tmp_path / "kept")
    entry = decide(line, line)

    assert (entry["verdict"], causes(entry)) == ("invalid", []), told(entry)
    assert "0 backwards and 0 optimizer steps" in entry["headline"]
    assert "finished checkpoint" in entry["because"]
    assert "rm -rf" in entry["fix"]
