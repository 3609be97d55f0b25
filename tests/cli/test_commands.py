"""The other commands: list, replay, report, diff, explain, init."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from equivcheck import result as results
from equivcheck.causes import CAUSES

LATEST = "reports/latest/result.json"

LISTED = """\
exit 0
--- stdout
3029aa4232  train_step.py  K=2
ab89138d00  train_step.py  K=4
--- stderr
"""

CHANGED = """\
exit 1
--- stdout
broken    3029aa4232  train_step.py  K=2
  was     equivalent gradients 2.1e-16  margin 57x
  now     divergent EQ101 gradients 3.0e+00  2e+14x noise
fixed     ab89138d00  train_step.py  K=4
  was     divergent EQ101 gradients 3.0e+00  2e+14x noise
  now     equivalent gradients 2.1e-16  margin 57x
2 changed, 0 same
--- stderr
"""


def test_list_runs_nothing(cli, engine):
    """Ids and labels, stable."""

    assert str(cli("list", "train_step.py")) == LISTED
    assert cli("list", "train_step.py", "-k", "K=9").code == 5
    assert engine.ran == []


@pytest.mark.parametrize(
    ("before", "now", "word", "code"),
    [
        ("failing", "passing", "FIXED", 0),
        ("failing", "failing", "STILL DIVERGENT", 1),
        ("passing", "passing", "SAME", 0),
        ("passing", "failing", "NOW DIVERGENT", 1),
        ("failing", "raising", "ERROR", 3),
        ("passing", "unclear", "INCONCLUSIVE", 4),
    ],
)
def test_replay_says_what_became_of_a_case(cli, engine, before, now, word, code):
    """Found by a prefix of its id, run with the options it was recorded with."""
    answers = {
        "failing": engine.failing(),
        "passing": engine.passing(),
        "raising": {"verdict": "error", "error": {"type": "E", "exit_code": 3}},
        "unclear": {"verdict": "inconclusive"},
    }
    engine.answers[4] = answers[before]
    cli("run", "train_step.py", "--seed", "7")
    recorded = json.loads(Path(LATEST).read_text(encoding="utf-8"))["cases"][1]
    engine.answers[4] = answers[now]
    engine.ran.clear()
    outcome = cli("replay", recorded["id"][:5])

    assert outcome.code == code
    assert outcome.out.splitlines()[-1] == f"{word}  {recorded['id']}"
    assert [(case.accumulation_steps, case.seed) for case, *_ in engine.ran] == [(4, 7)]


def test_replay_names_another_cause(cli, engine):
    """Still divergent, but not for the same reason."""
    engine.answers[4] = engine.failing("EQ101")
    cli("run", "train_step.py")
    engine.answers[4] = engine.failing("EQ103")

    assert "STILL DIVERGENT (EQ101 before, EQ103 now)  ab89138d00" in cli("replay", "ab8").out


def test_replay_wants_one_case(cli):
    """Candidates are listed for a prefix that fits none or several."""
    cli("run", "train_step.py")
    outcome = cli("replay", "ffff")

    assert outcome.code == 2
    assert "3029aa4232 (K=2), ab89138d00 (K=4)" in outcome.err


def test_report_renders_what_was_printed(cli, engine):
    """From the file alone, the text of the run."""
    engine.answers[4] = engine.failing()
    ran = cli("run", "train_step.py")
    rendered = cli("report", LATEST)

    assert rendered.code == 0
    assert rendered.out == ran.out


def test_report_writes_every_format(cli):
    """To files, or to stdout with a hyphen."""
    cli("run", "train_step.py")
    outcome = cli(
        *("report", LATEST, "--html", "a.html", "--junit", "a.xml", "--markdown", "a.md"),
        *("--json", "-"),
    )

    assert (outcome.code, json.loads(outcome.out)) == (0, results.load(LATEST))
    assert all(Path(name).stat().st_size for name in ("a.html", "a.xml", "a.md"))


def test_markup_in_names_is_inert(cli, engine):
    """A parameter or a message is text in every rendering."""
    evil = "</pre><script>alert(1)</script>|`"
    engine.answers[4] = engine.failing(headline=f"EQ101 {evil}", notes=[evil])
    cli("run", "train_step.py", "--html", "a.html")
    told = cli("report", LATEST, "--markdown", "-").out

    assert "<script>alert" not in Path("a.html").read_text(encoding="utf-8")
    assert told.count("```") == 2


def test_diff_names_what_changed(cli, engine):
    """1 if anything passes no longer, else 0."""
    engine.answers[4] = engine.failing()
    cli("run", "train_step.py", "--json", "old.json")
    engine.answers = {2: engine.failing()}
    cli("run", "train_step.py", "--json", "new.json")

    assert str(cli("diff", "old.json", "new.json")) == CHANGED
    assert cli("diff", "old.json", "old.json").out == "0 changed, 2 same\n"


def test_a_new_failing_case_is_broken(cli, engine):
    """Nothing fails unseen because it has no past."""
    cli("run", "train_step.py", "--accumulation-steps", "2", "--json", "old.json")
    engine.answers[4] = engine.failing()
    cli("run", "train_step.py", "--json", "new.json")

    assert cli("diff", "old.json", "new.json").code == 1
    assert cli("diff", "new.json", "old.json").out.startswith("gone      ab89138d00")


@pytest.mark.parametrize("cause", CAUSES.values(), ids=CAUSES)
def test_explain_fits_the_screen(cli, cause):
    """By code or by name, in 80 columns but for links."""
    by_code, by_name = cli("explain", cause.code.lower()), cli("explain", cause.name)
    lines = by_code.out.splitlines()

    assert by_code.code == 0
    assert by_code.out == by_name.out
    assert lines[0] == f"{cause.code} {cause.name}"
    assert all(len(line) <= 80 for line in lines if "https://" not in line)


def test_explain_lists_all(cli):
    """Every code with its name."""

    assert cli("explain").out.count("\nEQ") == len(CAUSES) - 1


def test_doctor_trusts_nothing(cli, engine, monkeypatch):
    """It runs a right and a wrong loop, and an engine that cannot tell them apart is not well."""

    def honest(subject, case, **_):
        wrong = "        loss.backward()" in Path(subject.target).read_text(encoding="utf-8")
        return engine.failing() if wrong else engine.passing()

    blind = cli("doctor")
    monkeypatch.setattr(engine, "run_case", honest)
    well = cli("doctor")

    assert (blind.code, well.code) == (70, 0)
    assert "known-bad              FAILED: equivalent" in blind.out
    assert "known-good             ok: equivalent" in well.out
    assert "known-bad              ok: divergent EQ101" in well.out


def test_warnings_and_notes_are_said_once(cli, engine):
    """Also when everything passes."""
    noted = engine.passing(notes=["dropout is switched off"], warnings=[{"code": "EQ503"}])
    engine.answers = {2: noted, 4: noted}
    outcome = cli("run", "train_step.py")

    assert outcome.code == 0
    assert outcome.out.count("note  dropout is switched off") == 1
    assert "warning EQ503 redundant-synchronisation (train_step.py K=4)" in outcome.out


def test_init_writes_a_starter(cli):
    """Which loads as a subject; nothing is overwritten."""
    outcome = cli("init", "mine.py")

    assert outcome.code == 0
    assert "[tool.equivcheck]" in outcome.out
    assert cli("list", "mine.py").code == 0
    assert cli("init", "mine.py").code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["run", "--show-config"],
        ["list", "--help"],
        ["explain"],
        ["explain", "EQ103"],
        ["report", LATEST],
        ["diff", LATEST, LATEST],
    ],
    ids=" ".join,
)
def test_no_torch_where_nothing_runs(cli, arguments):
    """These answer at once, and on machines without torch."""
    cli("run", "train_step.py")
    probe = (
        "import sys; from equivcheck.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'rich'} & set(sys.modules); sys.exit(code)"
    )
    told = subprocess.run(
        [sys.executable, "-c", probe, *arguments], capture_output=True, text=True, check=False
    )

    assert (told.returncode, told.stderr) == (0, "")


def test_a_closed_pipe_is_no_crash(cli):
    """`equivcheck explain | head -1` ends in silence."""
    command = f"{sys.executable} -m equivcheck explain | head -1"
    told = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)

    assert (told.stdout, told.stderr) == ("EQ000  unexplained\n", "")
