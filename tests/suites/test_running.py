"""Running suites: theory in both directions, workers, journals, shards, matrix."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equivcheck import result as results
from equivcheck.api import measure, plan
from equivcheck.config import OPTIONS
from equivcheck.errors import UsageError
from equivcheck.modules import executed_again, module_at
from equivcheck.report import matrix, text
from equivcheck.suite import bundled, expanded, is_suite, read_suite
from equivcheck.workload import OFFERED, load_workload

FIXTURES = bundled("fixtures")
SUITE = f"""
from equivcheck.suite import Workload, divergent, equivalent, part

PARTS = {{
    "build": part("{FIXTURES}/models/normed.py:Normed", norm="layer"),
    "batches": part("{FIXTURES}/batches/digits.py:classification", number=2, rows=8),
    "accumulation_steps": (2, 4),
    "splits": ("even",),
}}
WORKLOADS = [
    Workload("right", equivalent("it is"), **PARTS),
    Workload(
        "scheduled", equivalent("it is"), **PARTS,
        scheduler=part("torch.optim.lr_scheduler:ExponentialLR", gamma=0.5),
    ),
    Workload("claims_too_much", divergent("EQ201", source="wrongly"), **PARTS),
    Workload(
        "claims_too_little", equivalent("wrongly"),
        **{{**PARTS, "build": part("{FIXTURES}/models/normed.py:Normed", norm="batch_1d")}},
    ),
]
"""
STEP = """
import torch
from fixtures.rates import NAME, RATE

assert NAME == "FOLDER", NAME


def build():
    return torch.nn.Linear(2, 1)


def batches():
    return [{"x": torch.randn(8, 2)}]


def train(model, loader, accumulation_steps):
    from fixtures import rates  # while it trains, too

    assert rates.NAME == "FOLDER"
    stepper = torch.optim.SGD(model.parameters(), RATE)
    for step, batch in enumerate(loader):
        (model(batch["x"]).square().mean() / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            stepper.step()
            stepper.zero_grad()
"""
HANGING = """
import os, signal, time
def train(model, loader, loss, optimizer):
    for batch in loader:
        loss(model, batch).backward()
    {what}
"""
PARTS = """
import torch

def make(width, depth):
    return torch.nn.Linear(64, width)

def values(number, rows):
    return [{"x": torch.randn(rows, 64), "y": torch.randn(rows, 1)} for _ in range(number)]
"""
AHEAD = "../fixtures/suite_trainers/per_micro_batch.py"


def cli(folder, *arguments, **more):
    return subprocess.run(
        [sys.executable, "-m", "equivcheck", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **more,
    )


@pytest.fixture
def suite(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SUITE, encoding="utf-8")
    return tmp_path


def cases(path):
    return {case["id"]: case for case in results.load(path)["cases"]}


def test_a_result_that_theory_does_not_expect_fails_in_either_direction(suite):
    """Side by side as shard by shard, each of which runs in one process."""
    whole = cli(suite, "run", "mine.py", "-j", "2", "--json", "whole.json")
    met = {
        (case["workload"], case["theory"]["met"]) for case in cases(suite / "whole.json").values()
    }
    for shard in ("1/2", "2/2"):
        cli(suite, "run", "mine.py", "--shard", shard, "--json", f"{shard[0]}.json")
    merged = cli(suite, "merge", "1.json", "2.json", "--json", "merged.json")
    partial = cli(suite, "merge", "1.json", "--json", "-")

    assert (whole.returncode, merged.returncode) == (1, 1)
    assert met == {
        ("right", True),
        ("scheduled", True),
        ("claims_too_much", False),
        ("claims_too_little", False),
    }
    assert "Traceback" not in whole.stderr
    found = [
        {name: (case["verdict"], case["theory"]["met"]) for name, case in cases(path).items()}
        for path in (suite / "merged.json", suite / "whole.json")
    ]
    assert found[0] == found[1]
    assert partial.returncode == 130
    assert "there is no result of shard 2/2" in json.loads(partial.stdout)["notes"][-1]


def test_a_loop_with_one_fault_fails_where_that_fault_matters(suite):
    """And nowhere else; rows that it cannot be put under are told."""
    ran = cli(
        suite, "run", "mine.py", "-j", "2", "-k", "right or scheduled",
        "--train", f"{FIXTURES}/suite_trainers/per_micro_batch.py:schedule", "--json", "r.json",
    )  # fmt: skip
    failed = {
        case["workload"] for case in cases(suite / "r.json").values() if not case["theory"]["met"]
    }

    assert ran.returncode == 1
    # Without a schedule there is nothing to advance too often.
    assert failed == {"scheduled"}


def test_a_loop_that_asks_for_what_is_not_there_is_refused_once(suite):
    """Before any case runs, with its own place and the closest name."""
    (suite / "loop.py").write_text("\n\ndef train(modle, loader, loss): ...\n", encoding="utf-8")

    ran = cli(suite, "run", "mine.py", "--train", "loop.py:train", "--json", "r.json")

    assert ran.returncode == 2
    assert "unknown-argument: train of loop.py:train asks for 'modle'" in ran.stderr
    assert "where     loop.py:3" in ran.stderr
    assert "did you mean model?" in ran.stderr
    assert not (suite / "r.json").exists()


def test_what_a_loop_is_refused_for_is_what_no_run_offers():
    """The names that are known before a run are those that a run has."""
    seen = set()

    def train(model, loader, accumulation_steps, **others):
        seen.update({"model", "loader", "accumulation_steps", *others})
        plain_mean.train(model, loader, accumulation_steps)

    plain_mean = executed_again([module_at(str(FIXTURES / "trainers" / "plain_mean.py"))])[0]
    found = measure(plain_mean, train=train, accumulation_steps=2)

    assert found.verdict == "equivalent"
    assert seen == set(OFFERED)


@pytest.mark.parametrize("logs", [True, False])
def test_a_loop_is_known_by_its_own_place(suite, logs):
    """Whatever wraps it, and whatever options a row gives it."""
    path = suite / "mine.py"
    own = f'**PARTS, train=part("loop.py:train", rate=2), logs={logs})'
    path.write_text(SUITE.replace("**PARTS)", own, 1), encoding="utf-8")
    (suite / "loop.py").write_text("\ndef train(model, loader, rate): ...\n", encoding="utf-8")

    assert load_workload(str(path), "right").location == f"{suite}/loop.py:2"


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "worker-died: SIGKILL"),
        ("while True: time.sleep(1)", "timed-out"),
    ],
    ids=["killed", "endless"],
)
def test_what_ends_a_worker_costs_its_own_case(suite, what, told):
    """A case of verdict error, exit code 3, and the others are there."""
    (suite / "loop.py").write_text(HANGING.format(what=what), encoding="utf-8")

    ran = cli(
        suite, "run", "mine.py", "-j", "2", "-k", "right", "--train", "loop.py:train",
        "--timeout", "5", "--json", "r.json",
    )  # fmt: skip

    assert ran.returncode == 3
    assert [case["verdict"] for case in cases(suite / "r.json").values()] == ["error", "error"]
    assert told in ran.stdout


def test_a_file_of_the_user_named_like_a_module_does_not_reach_the_workers(tmp_path):
    """Workers start outside the user's folder, so a random.py there is imported by nobody but the user."""
    (tmp_path / "random.py").write_text("raise SystemExit('imported')\n")
    subject = FIXTURES / "trainers" / "plain_mean.py"

    # As the installed command does: the current folder is not on the path of the command itself.
    command = "import sys; del sys.path[0]; from equivcheck.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", command, "run", str(subject), "-j", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, False) == (done.returncode, "imported" in done.stdout + done.stderr)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_packages_of_the_user_are_not_taken_for_ours(suite, jobs):
    """A project may have `fixtures` and `suites` as well, and be where the command was started."""
    for name in ("fixtures", "suites"):
        (suite / name / "models").mkdir(parents=True)
        for folder in (suite / name, suite / name / "models"):
            (folder / "__init__.py").write_text("OWN = 1\n", encoding="utf-8")
    loop = (FIXTURES / "suite_trainers" / "naive.py").read_text(encoding="utf-8")
    own = "from fixtures.models import OWN\nimport suites\n"
    (suite / "loop.py").write_text(loop.replace("from typing", own + "from typing", 1), "utf-8")

    done = cli(
        suite, "run", "suite:loss_normalization", "--train", "loop.py:train", "-j", jobs,
        "-k", "workload=mean and split=even and accumulation_steps=2",
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr


def test_packages_of_the_same_name_in_two_folders(tmp_path):
    """Each target imports its own, in one run."""
    for folder, rate in (("one", "0.1"), ("other", "0.2")):
        package = tmp_path / folder / "fixtures"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("", encoding="utf-8")
        (package / "rates.py").write_text(f"RATE = {rate}\nNAME = {folder!r}\n", encoding="utf-8")
        (package / "step.py").write_text(STEP.replace("FOLDER", folder), encoding="utf-8")

    done = cli(tmp_path, "run", "one/fixtures/step.py", "other/fixtures/step.py")

    assert done.returncode == 0, done.stdout + done.stderr


def test_resume_without_a_journal_starts(suite):
    """A workflow that always resumes has a first run too; that it was one is said."""
    done = cli(suite, "run", "mine.py", "-k", "right", "--json", "r.json", "--resume")
    again = cli(suite, "run", "mine.py", "-k", "right", "--json", "r.json", "--resume")

    assert (done.returncode, again.returncode) == (0, 0)
    assert "resumed: nothing was finished before" in done.stdout
    assert "resumed: 2 cases were finished before" in again.stdout


@pytest.mark.parametrize(
    ("more", "total"), [(("-j", "2"), 8), (("-j", "1"), 8), (("-j", "2", "--shard", "2/2"), 4)]
)
def test_a_killed_run_is_resumed(suite, more, total):
    """No case is lost and none is run twice."""
    run = [sys.executable, "-m", "equivcheck", "run", "mine.py", "--json", "r.json", *more]
    process = subprocess.Popen(run, cwd=suite, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = suite / "r.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if journal.exists() and len(journal.read_text(encoding="utf-8").splitlines()) >= 2:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with journal.open("a", encoding="utf-8") as stream:
        stream.write('{"id": "cut off')
    before = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()[1:-1]]

    resumed = cli(suite, *run[3:], "--resume")
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()[1:]]

    assert resumed.returncode == 1
    assert len(lines) == len({line["id"] for line in lines}) == total
    assert lines[: len(before)] == before
    assert cases(suite / "r.json").keys() == {line["id"] for line in lines}
    (suite / "mine.py").write_text(SUITE + "\n", encoding="utf-8")
    assert cli(suite, "run", "mine.py", "--json", "r.json", "--resume").returncode == 2


def test_a_case_that_ends_python_is_an_error_and_the_others_run(suite):
    """Once may be a kill from outside, and the case runs again; the second time it is an error."""
    loop = "import os\n\ndef train(model, loader, loss): os._exit(9)\n"
    (suite / "loop.py").write_text(loop, encoding="utf-8")
    run = ("run", "mine.py", "-k", "workload=right", "--train", "loop.py:train", "--json", "r.json")

    ended = cli(suite, *run)

    assert ended.returncode == 3
    assert ended.stdout.count("note: the process ended with exit code 9 during case") == 4
    errors = [case["error"]["message"] for case in cases(suite / "r.json").values()]
    assert errors == ["process-ended: Python ended with exit code 9 in this case, 2 times"] * 2


def test_results_that_disagree_are_refused(suite):
    """A case that is equivalent here and divergent there is no whole."""
    cli(suite, "run", "mine.py", "-k", "right", "--json", "a.json")
    other = json.loads((suite / "a.json").read_text(encoding="utf-8"))
    other["cases"][0]["verdict"] = "divergent"
    (suite / "b.json").write_text(json.dumps(other), encoding="utf-8")

    merged = cli(suite, "merge", "a.json", "b.json", "--json", "c.json")

    assert merged.returncode == 2
    assert "disagree about case" in merged.stderr
    assert not (suite / "c.json").exists()


@pytest.mark.parametrize(
    ("shards", "told"),
    [
        (("1/2", "1/3"), "shards of other runs: 1/2, 1/3"),
        (("1/2", "1/2"), "shards overlap: 1/2 is there twice"),
        (("1/2", "2/2"), "shards overlap: case"),
    ],
    ids=["other-counts", "twice", "overlapping"],
)
def test_shards_that_are_no_parts_of_one_run_are_refused(tmp_path, shards, told):
    """Which files they are is said, and nothing is written."""
    case = {"id": "0123456789", "verdict": "equivalent", "causes": [], "target": "suite:amp"}
    paths = []
    for number, shard in enumerate(shards):
        whole = results.assemble([case], target="suite:amp")
        paths.append(tmp_path / f"{number}.json")
        results.write(paths[-1], {**whole, "shard": shard, "planned": 2})

    merged = cli(tmp_path, "merge", *map(str, paths), "--json", "all.json")

    assert merged.returncode == 2
    assert told in merged.stderr
    assert "1.json" in merged.stderr
    assert not (tmp_path / "all.json").exists()


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"seed": 7}, "seed is 0, and 7"),
        ({"device": "cuda"}, "device is cpu, and cuda"),
        ({"train": "loop.py:train"}, "train is none, and loop.py:train"),
        ({"run": {"settings": {"rng": "per-sample"}}}, "rng is off, and per-sample"),
        ({"run": {"code": {"a.py": "2"}}}, "code of a.py is 1, and 2"),
        ({"target": "suite:ddp"}, "target is suite:amp, and suite:ddp"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_shards_made_with_other_settings_are_refused(tmp_path, changed, told):
    """Both values are named: what is missing between two runs would not be seen."""
    run = {"settings": {"rng": "off"}, "code": {"a.py": "1"}}
    for number, more in ((1, {}), (2, changed)):
        own = {name: value for name, value in more.items() if name not in ("run", "target")}
        case = {"id": f"{number:010x}", "verdict": "equivalent", "causes": []}
        case |= {"target": "suite:amp", "seed": 0, "device": "cpu", "train": None, **own}
        whole = results.assemble([case], target=more.get("target", "suite:amp"))
        shard = {"shard": f"{number}/2", "planned": 2, "run": run | more.get("run", {})}
        results.write(tmp_path / f"{number}.json", {**whole, **shard})

    merged = cli(tmp_path, "merge", "1.json", "2.json", "--json", "all.json")

    assert merged.returncode == 2
    assert f"shards of other runs: {told}" in merged.stderr
    assert not (tmp_path / "all.json").exists()


def test_a_result_given_twice_is_refused(tmp_path):
    """However the path is written."""
    results.write(tmp_path / "a.json", results.assemble([], target="a.py"))
    merged = cli(tmp_path, "merge", "a.json", "./a.json", "--json", "all.json")

    assert merged.returncode == 2
    assert "results overlap: ./a.json is there twice" in merged.stderr


def test_a_shard_that_lacks_cases_is_no_whole(suite):
    """All shards are there, and one was made with fewer cases: the merged result is partial, and says so."""
    for shard in ("1/2", "2/2"):
        cli(suite, "run", "mine.py", "-k", "right", "--shard", shard, "--json", f"{shard[0]}.json")
    other = json.loads((suite / "2.json").read_text(encoding="utf-8"))
    (suite / "2.json").write_text(json.dumps({**other, "cases": []}), encoding="utf-8")

    merged = cli(suite, "merge", "1.json", "2.json", "--json", "-")

    assert merged.returncode == 130
    assert "1 of 2 cases are in none of the results" in json.loads(merged.stdout)["notes"][-1]


def test_every_scheduler_and_optimizer_of_torch_has_a_row():
    """Those that a newer torch brings are missed here."""
    import torch

    def used(target):
        suite = bundled("suites").joinpath(f"{target}.py").read_text(encoding="utf-8")
        text = (FIXTURES / "schedules.py").read_text(encoding="utf-8")
        text += (FIXTURES / "trainers" / "lbfgs.py").read_text(encoding="utf-8")
        return set(re.findall(r"\w+", suite + text))

    schedulers = {
        name
        for name, kind in vars(torch.optim.lr_scheduler).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler)
    } - {"LRScheduler", "_LRScheduler"}
    optimizers = {
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    } - {"Optimizer"}

    assert len(schedulers) > 12
    assert len(optimizers) > 12
    assert schedulers - used("schedulers") == set()
    assert optimizers - used("optimizers") == set()


def test_the_digits_are_those_of_scikit_learn():
    """What is kept beside the fixtures, so that a wheel needs nothing else, is the data set that it says it is."""
    import torch
    from sklearn.datasets import load_digits

    [module] = executed_again([module_at(str(FIXTURES / "batches" / "digits.py"))])
    images, classes = module._digits()
    theirs = load_digits()

    assert torch.equal(images, torch.tensor(theirs.data, dtype=torch.float32) / 16)
    assert torch.equal(classes, torch.tensor(theirs.target))


def test_there_are_five_hundred_cases():
    """In suite:all, each with a source, in one process; rank suites are apart."""
    values = {name: option.default for name, option in OPTIONS.items()}
    jobs, _ = plan(["suite:all"], values, explicit=False)

    assert len(jobs) >= 500
    assert len({job.case.id for job in jobs}) == len(jobs)
    assert all(job.theory["source"] for job in jobs)
    assert {job.case.world_size for job in jobs} == {1}
    assert "suite:ddp" in expanded("suite:ranks")


def test_a_case_that_is_to_stay_undecided_says_nothing_of_the_detection_power():
    """The power of a run is that of its decided cases."""
    decided = {"verdict": "equivalent", "detection_power": 1e-13}
    open_case = {
        "verdict": "expected",
        "detection_power": 130.0,
        "theory": {"verdict": "inconclusive", "found": "inconclusive", "met": True},
    }

    told = " ".join(text.summary({"cases": [decided, open_case]}).split())

    assert "a relative fault of 1.0e-13 would have been seen" in told


def test_the_matrix_fits_a_terminal():
    """Every line has at most 80 columns, and what fails is marked."""
    rows = [
        {
            "id": f"{number:010x}",
            "target": "suite:normalization",
            "workload": f"a_workload_with_a_rather_long_name_{number % 3}",
            "accumulation_steps": 2 ** (number // 3),
            "split": "even" if number % 2 else "uneven",
            "verdict": "divergent" if number == 4 else "equivalent",
            "causes": [{"code": "EQ201", "status": "proved"}] if number == 4 else [],
            "margin": 3.0e7,
        }
        for number in range(18)
    ]
    shown = matrix.render({"cases": rows})

    assert max(map(len, shown.splitlines())) <= 80
    assert "!201" in shown
    assert "17 equivalent, 1 divergent" in shown


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ('"right", equivalent', '"scheduled", equivalent'),
        ('("even",)', '("evn",)'),
        ('"EQ201"', '"EQ999"'),
        ('source="wrongly"', 'source=""'),
        ('source="wrongly"', 'source="wrongly", split="evn"'),
        ('source="wrongly"', 'source="wrongly", strategy=("ddp", "dpd")'),
        ('source="wrongly"', 'source="wrongly", accumulation_steps="ful"'),
        ('source="wrongly"', 'source="wrongly", world_size="2"'),
        ('source="wrongly"', 'source="wrongly", precision="bf61"'),
        ('source="wrongly"', 'source="wrongly", rng="on"'),
        ("WORKLOADS", "WORKLOAD"),
        ("WORKLOADS", "ROWS"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, change, told):
    """The row, and what is wrong with it, are named."""
    path = Path(tmp_path, "mine.py")
    path.write_text(SUITE.replace(change, told), encoding="utf-8")

    assert is_suite(str(path))
    with pytest.raises(UsageError, match="bad-suite"):
        read_suite(str(path))


def test_conditions_that_a_case_can_meet_are_read(tmp_path):
    """One or several of them, and the word for a sample in each micro-batch."""
    path = Path(tmp_path, "mine.py")
    more = 'source="x", split="uneven", accumulation_steps=(2, FULL), precision=("bf16", "native")'
    text = SUITE.replace('source="wrongly"', more).replace(
        "import Workload", "import FULL, Workload"
    )
    path.write_text(text, encoding="utf-8")

    assert len(read_suite(str(path)).workloads) == 4


@pytest.mark.parametrize(
    ("change", "wrong", "told"),
    [
        ("number=2", "nunber=2", ["takes no option 'nunber'", "did you mean number?"]),
        ('norm="layer"', "width=4", ["build", "takes no option 'width'"]),
        (':Normed", norm="layer"', ':make", depth=1', ["build", "wants width"]),
        (
            f"{FIXTURES}/batches/digits.py:classification",
            "parts.py:values",
            ["standard loop", "class numbers y", "y of torch.float32, shape [8, 1]"],
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_once(suite, change, wrong, told):
    """On planning, with what was meant; not case by case."""
    (suite / "parts.py").write_text(PARTS, encoding="utf-8")
    wrong = wrong.replace("parts.py", f"{suite}/parts.py")
    if ":make" in wrong:
        change = f"{FIXTURES}/models/normed.py{change}"
        wrong = f"{suite}/parts.py{wrong}"
    (suite / "mine.py").write_text(SUITE.replace(change, wrong), encoding="utf-8")
    values = {name: option.default for name, option in OPTIONS.items()}

    with pytest.raises(UsageError) as caught:
        plan([str(suite / "mine.py")], values, explicit=False)

    assert [text for text in told if text not in str(caught.value)] == []


def test_cases_that_a_row_s_batches_do_not_hold_are_left_out_and_told(suite):
    """Options for a whole suite need not fit all rows; where none of them is left, they are refused."""

    def planned(world_size):
        values = {name: option.default for name, option in OPTIONS.items()}
        values |= {"world_size": (world_size,), "strategy": ("ddp",)}
        stated = {"world_size", "strategy"}.__contains__
        return plan([str(suite / "mine.py")], values, explicit=False, stated=stated)

    jobs, notes = planned(4)

    assert {job.case.accumulation_steps for job in jobs} == {2}
    assert len(notes) == 4
    assert all("8 rows for accumulation_steps=4 * world_size=4" in note for note in notes)
    with pytest.raises(UsageError, match="8 rows for accumulation_steps=2"):
        planned(8)
