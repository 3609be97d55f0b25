"""`equivcheck run`: whole outputs, exit code first."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from equivcheck.errors import UsageError

LATEST = Path("reports/latest/result.json")

PASSED = """\
exit 0
--- stdout
HEADER

train_step.py
  K=2                  equivalent     gradients 2.1e-16  margin 57x
  K=4                  equivalent     gradients 2.1e-16  margin 57x

2 equivalent in 1.0 s; a relative fault of 1.2e-14 would have been seen
--- stderr
from user code
from user code
"""

FAIL = """\
exit 1
--- stdout
HEADER

train_step.py
  K=2                  equivalent     gradients 2.1e-16  margin 57x
  K=4                  DIVERGENT      EQ101  gradients 3.0e+00  2e+14x noise

EQ101 missing-division: 4.000x the full batch's gradient (K=4)
  where     case ab89138d00  train_step.py  K=4  first at optimizer_step 0
  expected  a relative error within noise (the control measures 1.9e-16)
  got       gradients 3.0e+00, scale 4.000, cosine 1.000
  weights   full batch   0.2500 0.2500 0.2500 0.2500  residual 7.0e-16
  weights   accumulated  1.000 1.000 1.000 1.000  residual 6.0e-16
  because   each micro-batch's loss is already a mean, and the K means are
            summed instead of averaged
  evidence  put right (reweight): 3.0e+00 -> 1.1e-16, within noise
  fix       (loss / accumulation_steps).backward()
  gradients worst parameters                     relative    scale   cosine
            head.weight                           3.0e+00    4.000    1.000
  replay    equivcheck replay ab89138d00
  learn     equivcheck explain EQ101

1 equivalent, 1 divergent in 1.0 s
--- stderr
from user code
from user code
"""

RAISED = """\
exit 3
--- stdout
HEADER

train_step.py
  K=4                  ERROR          RuntimeError: size 8 is not 9

RuntimeError: size 8 is not 9
  where     case ab89138d00  train_step.py  K=4
  at        train_step.py:3
  traceback File "train_step.py", line 3, in train
              loss(x)
  replay    equivcheck replay ab89138d00

1 error in 0.0 s
--- stderr
from user code
"""

ERROR = {
    "type": "RuntimeError",
    "message": "size 8 is not 9",
    "traceback": 'File "train_step.py", line 3, in train\n  loss(x)\n',
    "where": "train_step.py:3",
    "exit_code": 3,
}


def shown(outcome):
    """The output with what depends on the installation replaced."""
    header = (
        f"equivcheck {importlib.metadata.version('equivcheck')}  "
        f"torch {importlib.metadata.version('torch')}  python {platform.python_version()}  seed 0"
    )
    return str(outcome).replace(header, "HEADER")


def test_a_pass_shows_its_margin(cli):
    """A green line says how green."""

    assert shown(cli("run", "train_step.py")) == PASSED


def test_a_failure_says_what_to_do(cli, engine):
    """Code, name and number first, then where, expected, because, evidence, fix, replay."""
    rows = [{"name": "head.weight", "relative": 3.0, "scale": 4.0, "cosine": 1.0}]
    engine.answers[4] = engine.failing(per_parameter=rows)
    outcome = cli("run", "train_step.py")

    assert shown(outcome) == FAIL
    assert max(len(line) for line in outcome.out.splitlines()[1:]) <= 80


def test_an_exception_of_the_users_is_shown_as_theirs(cli, engine):
    """With their frames and the line it happened on."""
    engine.answers[4] = {"verdict": "error", "error": ERROR}

    assert shown(cli("run", "train_step.py", "--accumulation-steps", "4")) == RAISED


@pytest.mark.parametrize(
    ("answer", "code", "headline"),
    [
        (
            {
                "verdict": "inconclusive",
                "headline": "the same batch gives other gradients",
                "causes": [{"code": "EQ602", "status": "proved"}],
            },
            4,
            "EQ602 stochastic-step: the same batch gives other gradients (K=4)",
        ),
        (
            {"verdict": "invalid", "headline": "no optimizer step"},
            4,
            "no optimizer step",
        ),
        (
            {
                "verdict": "divergent",
                "causes": [{"code": "EQ312", "status": "suspected"}],
                "divergence": {"gradients": {"relative": 0.0}, "parameters": {"relative": 0.3}},
            },
            1,
            "EQ312 optimizer-state-per-micro-batch: 3e-01 relative error of the parameters",
        ),
        (
            {
                "verdict": "divergent",
                "causes": [{"code": "EQ000", "status": "suspected"}],
                "divergence": {"gradients": {"relative": float("inf"), "scale": float("nan")}},
            },
            1,
            "EQ000 unexplained: divergent (K=4)",
        ),
    ],
    ids=["inconclusive", "invalid", "parameters", "not-finite"],
)
def test_every_verdict_has_a_headline(cli, engine, answer, code, headline):
    """Whatever the engine leaves out."""
    engine.answers[4] = answer
    outcome = cli("run", "train_step.py", "--accumulation-steps", "4", "--html", "r.html")

    assert outcome.code == code
    assert f"\n{headline}" in outcome.out


def test_a_fault_of_ours_costs_no_other_case(cli, engine):
    """Exit code 70, the other case is still there, the traceback is in the result."""
    engine.answers[2] = ZeroDivisionError("ours")
    outcome = cli("run", "train_step.py")
    cases = json.loads(LATEST.read_text(encoding="utf-8"))["cases"]

    assert outcome.code == 70
    assert "internal error: ZeroDivisionError: ours" in outcome.out
    assert "Traceback" not in outcome.out
    assert "ZeroDivisionError" in cases[0]["error"]["traceback"]
    assert [case["verdict"] for case in cases] == ["error", "equivalent"]


def test_ctrl_c_keeps_what_is_finished(cli, engine):
    """Exit code 130 with a partial result."""
    engine.answers[4] = KeyboardInterrupt()
    outcome = cli("run", "train_step.py")
    result = json.loads(LATEST.read_text(encoding="utf-8"))

    assert outcome.code == 130
    said = " ".join(outcome.out.split())
    assert "interrupted: 1 of 2 cases ran; 1 equivalent in 0.5 s" in said
    assert "the same command with --resume runs the rest" in said
    assert result["planned"] == 2
    assert (result["verdict"], result["interrupted"], len(result["cases"])) == ("error", True, 1)


def test_an_error_half_way_keeps_what_is_finished(cli, engine):
    """A usage error of the second case does not lose the first."""
    engine.answers[4] = UsageError("the batch has 6 rows")
    outcome = cli("run", "train_step.py")

    assert outcome.code == 2
    assert "error: the batch has 6 rows" in outcome.err
    assert "1 equivalent" in outcome.out
    assert len(json.loads(LATEST.read_text(encoding="utf-8"))["cases"]) == 1


def test_json_on_stdout_is_pure(cli):
    """Whatever the user's code prints; the text goes to stderr."""
    outcome = cli("run", "train_step.py", "--json", "-")
    result = json.loads(outcome.out)

    assert (outcome.code, result["schema"], result["verdict"]) == (
        0,
        "equivcheck.result/1",
        "equivalent",
    )
    assert "from user code" in outcome.err
    assert "margin 57x" in outcome.err


def test_every_rendering_is_written(cli, engine):
    """JSON, JUnit and HTML, beside the default result."""
    engine.answers[4] = engine.failing()
    outcome = cli(
        *("run", "train_step.py", "--json", "a/r.json", "--junit", "a/r.xml", "--html", "a/r.html")
    )
    suite = ET.parse("a/r.xml").getroot()[0]
    page = Path("a/r.html").read_text(encoding="utf-8")

    assert outcome.code == 1
    assert Path("a/r.json").read_bytes() == LATEST.read_bytes()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    assert "EQ101 missing-division" in page
    assert page.count("<script") == 4  # three of its own, and the data


@pytest.mark.parametrize("flag", ["--json", "--html", "--junit"])
@pytest.mark.parametrize(
    ("path", "told"),
    [("/proc/nowhere/r", "No such file"), ("folder", "it is a folder"), ("file/r", "")],
)
def test_an_unwritable_path_is_refused_before_the_first_run(cli, engine, flag, path, told):
    """Minutes are not spent on a result that has nowhere to go."""
    Path("folder").mkdir()
    Path("file").touch()
    outcome = cli("run", "train_step.py", flag, path)

    assert outcome.code == 2
    assert f"cannot write {flag} {path}: {told}" in outcome.err
    assert engine.ran == []


def test_a_full_disk_does_not_cost_the_result(cli):
    """It is printed, and exit code 2 says that the file is not there."""
    outcome = cli("run", "train_step.py", "--json", "/dev/full")

    assert outcome.code == 2
    assert "2 equivalent" in outcome.out
    assert "cannot write /dev/full: No space left on device" in outcome.err


@pytest.mark.parametrize(
    ("expression", "steps"),
    [("K=4", [4]), ("not K=4", [2]), ("(K=2 or K=4) and even", [2, 4]), ("train_step", [2, 4])],
)
def test_k_selects(cli, engine, expression, steps):
    """Substrings joined by and, or, not and parentheses."""

    assert cli("run", "train_step.py", "-k", expression).code == 0
    assert [case.accumulation_steps for case, *_ in engine.ran] == steps


@pytest.mark.parametrize("told", ["--split", "file"])
def test_both_cuts_in_one_run(cli, engine, told):
    """On the command line and in a file."""
    if told == "file":
        page = "[tool.equivcheck]\nsplit = ['even', 'uneven']\n"
        Path("pyproject.toml").write_text(page, encoding="utf-8")
    outcome = cli("run", "train_step.py", *(["--split", "even,uneven"] if told != "file" else []))

    assert outcome.code == 0
    ran = [(case.split, case.accumulation_steps) for case, *_ in engine.ran]
    assert ran == [("even", 2), ("even", 4), ("uneven", 2), ("uneven", 4)]


def test_nothing_selected_is_not_a_pass(cli):
    """Exit code 5, and what there would have been."""
    outcome = cli("run", "train_step.py", "-k", "K=9")

    assert outcome.code == 5
    assert "-k K=9 matches none of: K=2, K=4" in outcome.out


def test_x_stops_at_the_first_failure(cli, engine):
    """And says that it did."""
    engine.answers[2] = engine.failing()
    outcome = cli("run", "train_step.py", "-x")

    assert (outcome.code, len(engine.ran)) == (1, 1)
    assert "note  stopped at the first failure (-x)" in outcome.out


def test_quiet_and_verbose(cli, engine):
    """-q leaves failures and the summary; -v gives every case its block."""
    engine.answers[4] = engine.failing()
    quiet, verbose = (cli("run", "train_step.py", flag) for flag in ("-q", "-v"))

    assert "K=2  " not in quiet.out
    assert "EQ101 missing-division" in quiet.out
    assert verbose.out.count("  replay ") == 2


def test_expect_reaches_the_engine(cli, engine):
    """Repeated or with commas, in any case; a declared cause that is absent is a failure."""
    outcome = cli("run", "train_step.py", "--expect", "eq201", "--expect", "EQ203,EQ201")

    assert engine.ran[0][1] == ("EQ201", "EQ203")
    assert outcome.code == 1
    assert "declared EQ201, EQ203 not found" in outcome.out


def test_a_default_k_that_does_not_fit_is_a_note(cli):
    """An explicit one is an error."""
    Path("pyproject.toml").write_text("[tool.equivcheck]\nseed = 3\n", encoding="utf-8")

    assert cli("run", "train_step.py", "--accumulation-steps", "32").code == 2


def test_color_changes_no_word(cli, engine):
    """Without its escape sequences the coloured text is the plain one."""
    engine.answers[4] = engine.failing()
    plain = cli("run", "train_step.py")
    coloured = cli("run", "train_step.py", "--color", "always")
    stripped = coloured.out
    for code in ("\x1b[32m", "\x1b[31;1m", "\x1b[0m"):
        stripped = stripped.replace(code, "")

    assert "\x1b[31;1mDIVERGENT" in coloured.out
    assert stripped == plain.out


def test_force_color_and_no_color(cli, monkeypatch):
    """NO_COLOR wins over FORCE_COLOR, the flag over both."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    both = cli("run", "train_step.py")
    monkeypatch.delenv("NO_COLOR")
    forced = cli("run", "train_step.py")
    never = cli("run", "train_step.py", "--color", "never")

    assert ["\x1b" in each.out for each in (both, forced, never)] == [False, True, False]


def test_names_cannot_drive_the_terminal(cli, engine):
    """Control characters in messages are shown, not obeyed."""
    engine.answers[2] = {"verdict": "error", "error": ERROR | {"message": "\x1b[2J gone\r"}}
    outcome = cli("run", "train_step.py", "--junit", "r.xml")

    assert "\x1b" not in outcome.out
    assert "\\x1b[2J gone" in outcome.out
    ET.parse("r.xml")


def test_annotations_in_a_workflow(cli, engine, monkeypatch, tmp_path):
    """One per cause, at the user's file, and a step summary."""
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    engine.answers.update({2: engine.failing(), 4: engine.failing()})
    outcome = cli("run", "train_step.py")
    commands = [line for line in outcome.out.splitlines() if line.startswith("::")]

    assert len(commands) == 1
    assert commands[0].startswith(
        "::error file=train_step.py,line=1,title=EQ101 missing-division%3A 4.000x the full batch's"
    )
    assert "%0A  fix " in commands[0]
    assert "### equivcheck: divergent" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert not any(
        line.startswith("::") for line in cli("run", "train_step.py", "--github", "off").out.split()
    )
