"""Mistakes on the command line and in the configuration: refused with what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rnu"], "unknown command 'rnu'"),
        (["train_step.py"], "fix       equivcheck run train_step.py"),
        (["run"], "no target given"),
        (["run", "nope.py"], "nope.py"),
        (["run", "train_step.py", "--splt", "even"], "did you mean --split?"),
        (["run", "train_step.py", "--split", "evn"], "did you mean even?"),
        (["run", "train_step.py", "--split"], "expected one argument"),
        (["run", "train_step.py", "--accumulation-steps", "2,0"], "whole numbers of at least 1"),
        (["run", "train_step.py", "--accumulation-steps", "two"], "--accumulation-steps is 'two'"),
        (["run", "train_step.py", "--accumulation-steps", ""], "as in 2,4"),
        (["run", "train_step.py", "--seed", "-1"], "a whole number of at least 0"),
        (["run", "train_step.py", "--seed", str(2**64)], f"at most {2**62}"),
        (["run", "train_step.py", "--expect", "mising-division"], "did you mean missing-division"),
        (["run", "train_step.py", "--timeout", "nan"], "seconds, more than 0"),
        (["run", "train_step.py", "--expect", "EQ1O3"], "did you mean EQ1"),
        (["run", "train_step.py", "-k", "(K=2"], "a parenthesis is not closed"),
        (["run", "train_step.py", "-k", "K=2 K=4"], "and, or are missing"),
        (["run", "train_step.py", "-k", "not"], "a word is missing"),
        (["run", "train_step.py", "--world-size", "0"], "whole numbers of at least 1"),
        (["run", "train_step.py", "--strategy", "dpp"], "did you mean ddp?"),
        (["run", "--full", "a", "--accumulated", "b"], "no-such-program"),
        (["run", "--full", "python"], "no-accumulated-command"),
        (["run", "--accumulated", "python"], "no-full-command"),
        (["run", "t.py", "--full", "python"], "stands beside --full"),
        (["run", "--full", "python", "--versions", "a,b,c"], "names 3 interpreters"),
        (["run", "--full", "python", "--versions", "a,b"], "no-such-interpreter"),
        (["run", "--full", "python", "--accumulated", "python '"], "bad-command"),
        (["run", "suite:normalisation"], "suite:normalization"),
        (["run", "empty"], "empty-folder: empty has no suite and no subject"),
        (["run", "suite:normalization", "--expect", "EQ101"], "states what theory expects"),
        (["list", "train_step.py", "--json", "x"], "unknown argument --json of equivcheck list"),
        (["run", "train_step.py", "--markdown", "x"], "equivcheck report RESULT --markdown PATH"),
        (["run", "train_step.py", "--json", "a", "--html", "./a"], "--json and --html: both name"),
        (["run", "train_step.py", "--html", "a", "--junit", "a"], "--html and --junit: both name"),
        (["report", "r.json", "--html", "a", "--markdown", "a"], "--html and --markdown: both"),
        (["report", "r.json", "--html", "-", "--json", "-"], "--html and --json: both are for"),
        (["diff", "a", "b", "--html", "-", "--markdown", "-"], "both are for stdout"),
        (["replay", "abcd"], "there is no result at reports/latest/result.json"),
        (["report", "nope.json"], "cannot read the result nope.json"),
        (["explain", "EQ999"], "there is no cause 'EQ999'"),
        (["explain", "mean-of-mean"], "equivcheck explain mean-of-means"),
        (["init"], "train_step.py exists and is left as it is"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_exit_code_2(cli, engine, arguments, told):
    """With a sentence on stderr, and nothing was run."""
    Path("empty").mkdir()

    outcome = cli(*arguments)

    assert outcome.code == 2
    assert outcome.err.startswith("error: ")
    assert told in outcome.err
    assert engine.ran == []


def test_a_gpu_that_is_not_there_is_refused(cli, engine, monkeypatch):
    """Before anything runs: a pass on the cpu must not be shown as one on a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    outcome = cli("run", "train_step.py", "--device", "cuda")

    assert outcome.code == 2
    assert "no-gpu: --device cuda" in outcome.err
    assert "--device cpu" in outcome.err
    assert engine.ran == []


@pytest.mark.parametrize("asked", [True, False])
def test_what_train_does_not_ask_for_is_said(cli, asked):
    """A precision that was stated and handed to nobody has a note; any word is right for a train that asks."""
    if asked:
        source = Path("train_step.py").read_text(encoding="utf-8")
        source = source.replace("accumulation_steps)", "accumulation_steps, precision)")
        Path("train_step.py").write_text(source, encoding="utf-8")
    outcome = cli("run", "train_step.py", "--precision", "fp17")
    said = " ".join(outcome.out.split())

    assert outcome.code == 0
    assert ("train of train_step.py does not ask for precision" in said) is not asked


def test_an_unknown_key_is_refused(cli):
    """Section, key, closest valid key, valid list."""
    Path("pyproject.toml").write_text("[tool.equivcheck]\nspilt = 'even'\n", encoding="utf-8")
    outcome = cli("run", "train_step.py")

    assert outcome.code == 2
    assert outcome.err.splitlines()[0] == "error: unknown setting spilt"
    assert "pyproject.toml [tool.equivcheck]" in outcome.err
    assert "one of accumulation_steps, split," in outcome.err
    assert "did you mean split?" in outcome.err


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("[tool.equivcheck\n", "cannot read the configuration"),
        ("[tool]\nequivcheck = 3\n", "is not a table"),
        ("[tool.equivcheck]\nseed = 1.5\n", "seed is 1.5"),
        ("[tool.equivcheck]\naccumulation_steps = [2, 'x']\n", "accumulation_steps is '2,x'"),
        ("[tool.equivcheck]\nworld_size = [0]\n", "world_size is '0'"),
    ],
)
def test_a_bad_file_is_refused(cli, page, told):
    """Naming the file and the key."""
    Path("pyproject.toml").write_text(page, encoding="utf-8")
    outcome = cli("run", "train_step.py")

    assert outcome.code == 2
    assert told in outcome.err


def test_an_unknown_variable_is_refused(cli, monkeypatch):
    """A misspelt variable would otherwise be ignored in silence."""
    monkeypatch.setenv("EQUIVCHECK_SEDE", "3")
    outcome = cli("run", "train_step.py")

    assert outcome.code == 2
    assert "unknown setting EQUIVCHECK_SEDE" in outcome.err
    assert "did you mean EQUIVCHECK_SEED?" in outcome.err


def test_command_line_over_environment_over_file(cli, monkeypatch):
    """And `--show-config` says which of them it was."""
    page = "[tool.equivcheck]\nseed = 1\nsplit = 'uneven'\noptimizer_steps = 3\n"
    Path("pyproject.toml").write_text(page, encoding="utf-8")
    Path("deep").mkdir()
    monkeypatch.chdir("deep")
    monkeypatch.setenv("EQUIVCHECK_SEED", "2")
    monkeypatch.setenv("EQUIVCHECK_SPLIT", "even")
    told = cli("run", "--show-config", "--seed", "3").out.splitlines()
    found = {line.split()[0]: line.split(maxsplit=2)[1:] for line in told}

    assert found["seed"] == ["3", "--seed"]
    assert found["split"] == ["even", "EQUIVCHECK_SPLIT"]
    assert found["optimizer_steps"][0] == "3"
    assert found["optimizer_steps"][1].endswith("pyproject.toml [tool.equivcheck] optimizer_steps")
    assert found["device"] == ["cpu", "default"]


def test_targets_may_stand_between_flags(cli, engine):
    """`run a.py --seed 1 b.py` runs both."""
    Path("b.py").write_text(Path("train_step.py").read_text(encoding="utf-8"), encoding="utf-8")
    outcome = cli("run", "train_step.py", "--seed", "1", "b.py", "--accumulation-steps", "2")

    assert outcome.code == 0
    assert [case.target for case, *_ in engine.ran] == ["train_step.py", "b.py"]


def test_list_says_that_nothing_matches(cli):
    """As `run` does, with what there is."""
    outcome = cli("list", "train_step.py", "-k", "nothing")

    assert outcome.code == 5
    assert "-k nothing matches none of: K=2, K=4" in outcome.out


def test_a_case_that_a_later_run_has_replaced(cli):
    """The message says where to look, and names a few of the cases that are there."""
    cli("run", "train_step.py", "--accumulation-steps", ",".join(map(str, range(1, 13))))
    outcome = cli("replay", "ffffffffff")

    assert outcome.code == 2
    assert "equivcheck replay ffffffffff --result PATH" in outcome.err
    assert "and 4 more" in outcome.err
    assert outcome.err.count("K=") == 8


def test_a_bug_in_a_command_is_exit_code_70(cli, monkeypatch):
    """A short block, and the traceback in a file."""

    def broken(_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("equivcheck.cli.explain.explained", broken)
    outcome = cli("explain", "EQ103")

    assert outcome.code == 70
    assert outcome.err.startswith("internal error: ZeroDivisionError: ours\n")
    assert "Traceback" not in outcome.err
    assert "Traceback" in Path("reports/latest/equivcheck-crash.txt").read_text(encoding="utf-8")
