"""`check` and `measure`: the same experiment from Python."""

from __future__ import annotations

import pytest

import equivcheck
from equivcheck import errors
from equivcheck.api import plan


@pytest.fixture
def folder(cli):
    """A folder with a subject, and the stub of the engine."""
    assert cli


@pytest.mark.usefixtures("folder")
def test_a_pass_is_a_result():
    """`check` returns what `measure` returns."""
    found = equivcheck.check("train_step.py")

    assert (found.verdict, found.exit_code, len(found.cases)) == ("equivalent", 0, 2)
    assert found.cases == equivcheck.measure("train_step.py").cases


@pytest.mark.usefixtures("folder")
def test_a_divergence_is_a_failed_assertion(engine):
    """With the report as its message, code, name and number first."""
    engine.answers[4] = engine.failing()
    with pytest.raises(AssertionError) as raised:
        equivcheck.check("train_step.py", accumulation_steps=4)

    assert str(raised.value).startswith("EQ101 missing-division: 4.000x")
    assert "equivcheck replay" in str(raised.value)


@pytest.mark.usefixtures("folder")
def test_measure_never_raises_for_a_divergence(engine):
    """And `worst` is the case that decides."""
    engine.answers = {2: engine.failing(), 4: engine.failing("EQ103")}
    engine.answers[4]["divergence"]["gradients"]["relative"] = 9.0
    found = equivcheck.measure("train_step.py")

    assert (found.verdict, found.exit_code) == ("divergent", 1)
    assert found.worst["causes"][0]["code"] == "EQ103"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ({"verdict": "error", "error": {"type": "E", "exit_code": 3}}, errors.StepError),
        ({"verdict": "inconclusive"}, errors.InconclusiveError),
        ({"verdict": "invalid"}, errors.InconclusiveError),
        (ZeroDivisionError("ours"), errors.InternalError),
    ],
)
@pytest.mark.usefixtures("folder")
def test_other_ends_are_errors_of_their_own(engine, answer, kind):
    """Only a divergence is an assertion."""
    engine.answers[4] = answer
    with pytest.raises(kind):
        equivcheck.check("train_step.py")


@pytest.mark.usefixtures("folder")
def test_nothing_to_run_is_no_pass(engine, monkeypatch):
    """A check that compared nothing never passes."""
    monkeypatch.setattr(engine, "plan_cases", lambda *_, **__: ([], ["too small"]))
    with pytest.raises(equivcheck.UsageError, match="nothing was left to run"):
        equivcheck.check("train_step.py")


@pytest.mark.parametrize(
    "wrong",
    [
        {"accumulation_steps": 0},
        {"accumulation_steps": [2, "x"]},
        {"split": "odd"},
        {"expect": "EQ999"},
        {"seed": -1},
        {"timeout": 0},
    ],
    ids=str,
)
@pytest.mark.usefixtures("folder")
def test_arguments_are_checked(engine, wrong):
    """As on the command line."""
    with pytest.raises(equivcheck.UsageError):
        equivcheck.measure("train_step.py", **wrong)

    assert engine.ran == []


@pytest.mark.usefixtures("folder")
def test_a_result_can_be_loaded(tmp_path):
    """What is written is what is read."""
    found = equivcheck.measure("train_step.py")
    (tmp_path / "r.json").write_text(found.to_json(), encoding="utf-8")

    assert equivcheck.load_result(str(tmp_path / "r.json")) == found


def test_a_strategy_of_one_rank_says_that_nothing_between_ranks_was_checked(tmp_path):
    path = tmp_path / "subject.py"
    path.write_text(
        "import torch\n"
        "def build():\n    return torch.nn.Linear(2, 1)\n"
        "def batches():\n    return [torch.ones(4, 2)]\n"
        "def train(model, loader, accumulation_steps):\n    raise AssertionError\n",
        encoding="utf-8",
    )
    values = {"accumulation_steps": [2], "strategy": "ddp"}

    _, notes = plan([str(path)], values, explicit=True)
    _, more = plan([str(path)], {**values, "world_size": [1, 2]}, explicit=True)

    assert [note.partition(":")[0] for note in notes] == ["--strategy ddp with one rank"]
    assert more == []
