"""Bad input, through the real command line and the real engine: clear words, right exit code, nothing lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from equivcheck.cli import main
from equivcheck.result import load

HEAD = """
from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

def build():
    return nn.Linear(4, 2)

def batches():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(8, 4, generator=generator), "y": torch.arange(8) % 2} for _ in range(2)]
"""

TRAIN = """
def train(model, loader, accumulation_steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, batch in enumerate(loader):
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (index + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


class Ran:
    """What one command left behind."""

    def __init__(self, code, out, err, folder):
        self.code, self.out, self.err = code, out, err
        self._folder = folder

    @property
    def result(self):
        """The result that was written."""
        return load(self._folder / "reports" / "latest" / "result.json")

    @property
    def cases(self):
        return self.result["cases"]

    def __str__(self):
        return f"exit {self.code}\n--- stdout\n{self.out}--- stderr\n{self.err}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, and no settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith(("EQUIVCHECK_", "GITHUB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    """Return a function that writes a subject and runs it in this process."""

    def go(*parts, arguments=(), head=HEAD):
        (folder / "train_step.py").write_text(head + "".join(parts), encoding="utf-8")
        capsys.readouterr()
        code = main(["run", "train_step.py", *arguments])
        streams = capsys.readouterr()
        return Ran(code, streams.out, streams.err, folder)

    return go


def command(*arguments):
    return [sys.executable, "-m", "equivcheck", "run", "train_step.py", *arguments]


def finished(folder, *arguments, **more):
    """Run a subject that was written, in a process of its own."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120, check=False, **more
    )
    return Ran(done.returncode, done.stdout, done.stderr, folder)


def no_frame_of_ours(text):
    package = str(Path(main.__code__.co_filename).parents[1])
    return package not in text and "site-packages" not in text


# ---- the target --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (TRAIN.replace("def train", "def trian"), "did you mean trian?"),
        ("", "has no 'train'"),
        ("train = 3\n", "train of train_step.py is int, not a function"),
        (TRAIN + "\ndel build\n", "has no 'build'"),
        (TRAIN.replace("loader,", "laoder, loader,"), "did you mean loader?"),
        (TRAIN.replace("loader,", "loader, tokenizer,"), "asks for 'tokenizer'"),
        (TRAIN.replace("loader,", "loader, epochs,"), "accumulation_steps, dataset, device"),
        (TRAIN + "\ndef batches():\n    return []\n", "batches() gave 0 batches"),
        (TRAIN + "\ndef batches():\n    return iter(())\n", "batches() gave 0 batches"),
        (TRAIN + "\ndef batches():\n    return None\n", "batches() returned NoneType"),
        (TRAIN + "\ndef batches():\n    return {'x': torch.ones(8, 4)}\n", "return [batch]"),
        (TRAIN + "\ndef batches():\n    return torch.ones(8, 4)\n", "return [batch]"),
        (TRAIN + "\ndef batches():\n    return [torch.ones(0, 4)]\n", "0 rows"),
        (TRAIN + "\ndef batches():\n    return ['words']\n", "batches() yielded str"),
        (TRAIN + "\ndef build():\n    return 3\n", "build() returned int"),
        (TRAIN + "\ndef build():\n    return nn.Linear\n", "build() returned type"),
        (
            TRAIN + "\ndef build(size):\n    return nn.Linear(4, 2)\n",
            "build of train_step.py wants size",
        ),
        (
            TRAIN + "\ndef build():\n    return nn.Linear(4, 2).requires_grad_(False)\n",
            "0 parameters that require a gradient",
        ),
        (TRAIN + "\ndef build():\n    return nn.ReLU()\n", "0 parameters that require a gradient"),
    ],
)
def test_a_mistake_in_a_subject_is_a_usage_error(run, source, told):
    """Exit code 2, on stderr, with what would be right; no traceback."""
    ran = run(source)

    assert ran.code == 2, ran
    assert ran.err.startswith("error: ")
    assert told in " ".join(ran.err.split())
    assert "Traceback" not in ran.err


def test_rows_that_disagree_are_named(run):
    """Both tensors, with their sizes."""
    ran = run(TRAIN, "\ndef batches():\n    return [{'x': torch.ones(8, 4), 'y': torch.ones(7)}]\n")

    assert ran.code == 2, ran
    assert all(word in ran.err for word in ("'x'", "8", "'y'", "7"))


def test_a_file_that_does_not_import(run):
    """Only the user's own traceback is shown."""
    ran = run("import no_such_module_anywhere\n", TRAIN)

    assert ran.code == 2, ran
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in ran.err
    assert "train_step.py" in ran.err
    assert "import no_such_module_anywhere" in ran.err
    assert no_frame_of_ours(ran.err)


def test_a_file_that_does_not_parse(run):
    """The line is shown."""
    ran = run("def broken(:\n", TRAIN)

    assert ran.code == 2, ran
    assert "def broken(:" in ran.err
    assert no_frame_of_ours(ran.err)


# ---- batches and cuts --------------------------------------------------------------------------


def test_a_generator_is_read_once(run):
    """It works, and gives each case the same batches."""
    source = """
def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield {"x": torch.randn(8, 4, generator=generator), "y": torch.arange(8) % 2}
"""
    ran = run(TRAIN, source)

    assert ran.code == 0, ran
    assert [case["verdict"] for case in ran.cases] == ["equivalent"] * 2
    assert ran.cases[0]["optimizer_steps_seen"] == {"full_batch": 3, "accumulated": 3}


def test_a_generator_without_an_end(run):
    """The first eight batches are enough."""
    source = """
def batches():
    while True:
        yield {"x": torch.randn(8, 4), "y": torch.arange(8) % 2}
"""
    ran = run(TRAIN, source, arguments=["--accumulation-steps", "2"])

    assert ran.code == 0, ran
    assert ran.cases[0]["optimizer_steps_seen"]["full_batch"] == 8


SMALL = "\ndef batches():\n    return [{'x': torch.randn(3, 4), 'y': torch.arange(3) % 2}] * 2\n"


def test_a_default_k_larger_than_the_batch_is_left_out(run):
    """With a note; the others run."""
    ran = run(TRAIN.replace('y"])', "y\"], reduction='sum') * accumulation_steps"), SMALL)

    assert ran.code == 0, ran
    assert [case["accumulation_steps"] for case in ran.cases] == [2]
    assert "accumulation_steps 4 left out" in " ".join(ran.out.split())


def test_an_explicit_k_larger_than_the_batch_is_refused(run):
    """The user asked for it."""
    ran = run(TRAIN, SMALL, arguments=["--accumulation-steps", "4"])

    assert ran.code == 2, ran
    assert all(word in ran.err for word in ("4", "3 rows"))


@pytest.mark.parametrize(
    ("made", "used"),
    [
        (
            "{'x': a.numpy(), 'y': y.numpy()}",
            "batch = {k: torch.as_tensor(v) for k, v in batch.items()}",
        ),
        ("Pair(a, y)", "batch = {'x': batch.x, 'y': batch.y}"),
        ("[a, [y, (a, None)], 'words', 3, 2.5]", "batch = {'x': batch[0], 'y': batch[1][0]}"),
        ("({'deep': [a]}, y, 'words')", "batch = {'x': batch[0]['deep'][0], 'y': batch[1]}"),
        ("Record(a, y)", "batch = {'x': batch.x, 'y': batch.y}"),
        ("{'x': a, 'y': y, 'temperature': torch.tensor(2.0), 'name': 'n'}", "pass"),
    ],
    ids=["numpy", "namedtuple", "nested lists", "dict in a tuple", "dataclass", "scalars"],
)
def test_any_nesting_is_cut(run, made, used):
    """Arrays, named tuples, lists, strings and scalars pass."""
    source = f"""
import dataclasses
import typing

class Pair(typing.NamedTuple):
    x: torch.Tensor
    y: torch.Tensor

@dataclasses.dataclass
class Record:
    x: torch.Tensor
    y: torch.Tensor

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        a, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 2
        yield {made}
"""
    ran = run(TRAIN.replace("        loss =", f"        {used}\n        loss ="), source)

    assert ran.code == 0, ran
    assert [case["verdict"] for case in ran.cases] == ["equivalent"] * 2


# ---- what train does ---------------------------------------------------------------------------


def raising(statement):
    return TRAIN.replace(
        "        loss =",
        f"        if accumulation_steps > 1 and index == accumulation_steps + 3:\n"
        f"            {statement}\n        loss =",
    )


def test_an_exception_names_step_and_micro_step(run):
    """At micro-step 3 of optimizer step 1, with the user's frames only; exit code 3."""
    ran = run(
        raising("raise RuntimeError('shapes differ')"), arguments=["--accumulation-steps", "4"]
    )
    error = ran.cases[0]["error"]

    assert ran.code == 3, ran
    assert error["message"] == "train-raised: RuntimeError: shapes differ"
    assert "optimizer_step 1, micro_step 3" in error["where"]
    assert "optimizer_step 1, micro_step 3" in " ".join(ran.out.split())
    assert "raise RuntimeError('shapes differ')" in ran.out
    assert no_frame_of_ours(ran.out + error["traceback"])


def test_an_exception_of_one_case_costs_no_other(run):
    """K=2 raises, K=4 is still decided."""
    ran = run(TRAIN + "    if accumulation_steps == 2:\n        raise KeyError('x')\n")

    assert ran.code == 3, ran
    assert [case["verdict"] for case in ran.cases] == ["error", "equivalent"]


@pytest.mark.parametrize("statement", ["sys.exit(0)", "sys.exit('done')", "raise SystemExit"])
def test_leaving_python_is_an_error_of_train(run, statement):
    """Exit code 3, not the one that the code asked for; the result is written."""
    ran = run("import sys\n", raising(statement), arguments=["--accumulation-steps", "4"])

    assert ran.code == 3, ran
    assert ran.cases[0]["error"]["message"].startswith("train-raised: SystemExit")
    assert "return from train instead of calling sys.exit()" in ran.out
    assert no_frame_of_ours(ran.out)


def test_leaving_python_in_build_is_an_error(run):
    """As in train."""
    ran = run("import sys\n", TRAIN, "\ndef build():\n    sys.exit(1)\n")

    assert ran.code == 3, ran
    assert ran.cases[0]["error"]["message"] == "build-raised: SystemExit: 1"


@pytest.mark.parametrize("lazy", [True, False], ids=["while read", "when called"])
def test_batches_that_raise(run, lazy):
    """Are the user's error too, with the user's frames only."""
    source = f"""
def batches():
    if {lazy}:
        yield {{"x": torch.randn(8, 4), "y": torch.arange(8) % 2}}
    raise OSError("no such data set")
"""
    ran = run(TRAIN, source if lazy else source.replace("yield", "return"))

    assert ran.code == 3, ran
    assert "batches-raised: OSError: no such data set" in ran.err
    assert 'raise OSError("no such data set")' in ran.err
    assert no_frame_of_ours(ran.err)


def test_no_optimizer_step_is_invalid(run):
    """Nothing was compared, so nothing passes."""
    ran = run(TRAIN.replace("optimizer.step()", "pass"))

    assert ran.code == 4, ran
    assert [case["verdict"] for case in ran.cases] == ["invalid"] * 2
    assert "0 optimizer steps" in ran.out
    assert "torch.optim" in ran.out


def test_a_loop_that_ends_before_it_trains_is_invalid(run):
    """It is told so, and not of optimizers that are not seen."""
    ran = run(TRAIN.replace("    optimizer = ", "    return\n    optimizer = ", 1))

    assert ran.code == 4, ran
    assert "0 backwards and 0 optimizer steps" in " ".join(ran.out.split())
    assert "returned before its first backward" in " ".join(ran.out.split())
    assert "torch.optim" not in ran.out


@pytest.mark.parametrize("clip", ["", "nn.utils.clip_grad_norm_(model.parameters(), 0.1); "])
def test_steps_without_a_gradient_are_invalid(run, clip):
    """Cleared before the step, gradients train nothing: two runs that agree on that prove nothing."""
    cleared = f"{clip}optimizer.zero_grad(set_to_none=False); optimizer.step()"
    ran = run(TRAIN.replace("optimizer.step()", cleared))

    assert ran.code == 4, ran
    assert [case["verdict"] for case in ran.cases] == ["invalid"] * 2
    assert ("zero when it steps" if clip else "none ever had a gradient") in ran.out


def test_an_optimizer_over_another_model_is_invalid(run):
    """With the reason."""
    ran = run(TRAIN.replace("SGD(model.parameters()", "SGD(build().parameters()"))

    assert ran.code == 4, ran
    assert ran.cases[0]["verdict"] == "invalid"
    assert "none of them is a parameter of the model that build() of train_step.py returned" in (
        " ".join(ran.out.split())
    )


def test_no_backward_is_invalid(run):
    """An optimizer that steps without gradients compares nothing."""
    ran = run(TRAIN.replace("(loss / accumulation_steps).backward()", "pass"))

    assert ran.code == 4, ran
    assert "none ever had a gradient" in " ".join(ran.out.split())


def test_nan_in_the_input_is_invalid(run):
    """Nothing can be compared with it."""
    ran = run(TRAIN.replace('model(batch["x"])', 'model(batch["x"] * float("nan"))'))

    assert ran.code == 4, ran
    assert [case["verdict"] for case in ran.cases] == ["invalid"] * 2
    assert "inf or nan in the full batch" in " ".join(ran.out.split())


def test_nan_in_the_accumulated_run_alone_is_invalid(run):
    """And is said to be there only."""
    ran = run(
        TRAIN.replace(
            "(loss / accumulation_steps)",
            "(loss / (1.0 if accumulation_steps == 1 else 0.0 * loss))",
        )
    )

    assert ran.code == 4, ran
    assert [case["verdict"] for case in ran.cases] == ["invalid"] * 2
    assert "inf or nan when accumulated" in " ".join(ran.out.split())


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU")
def test_a_hard_coded_gpu_is_explained(run):
    """Why it fails here, and what to write."""
    ran = run(TRAIN.replace("    optimizer =", "    model.cuda()\n    optimizer ="))
    said = " ".join(ran.out.split())

    assert ran.code == 3, ran
    assert "because" in said
    assert "no CUDA device" in said
    assert "model.to(device)" in said


# ---- time, interruption, disks -----------------------------------------------------------------

ENDLESS = """
import time

def train(model, loader, accumulation_steps):
    while True:
        try:
            time.sleep(0.01)
        except {caught}:
            pass
"""


@pytest.mark.parametrize("caught", ["ZeroDivisionError", "Exception", "BaseException"])
def test_a_loop_that_never_ends(run, caught):
    """Is ended by --timeout, also where it swallows exceptions."""
    started = time.monotonic()
    ran = run(
        ENDLESS.format(caught=caught), arguments=["--timeout", "1", "--accumulation-steps", "2"]
    )

    assert ran.code == 3, ran
    assert ran.cases[0]["error"]["message"] == "timed-out: no verdict after 1 s"
    assert time.monotonic() - started < 30


@pytest.fixture
def heeded():
    """Let processes heed an interrupt, also where these tests were started by a shell in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_an_interrupt_keeps_what_is_finished(folder):
    """Exit code 130, and a result that can be loaded, with the first case in it."""
    source = """
import time
from pathlib import Path

def train(model, loader, accumulation_steps):
    decide(model, loader, accumulation_steps)
    if accumulation_steps == 4:
        Path("reached").touch()
        time.sleep(100)
"""
    subject = HEAD + TRAIN.replace("def train", "def decide") + source
    (folder / "train_step.py").write_text(subject, encoding="utf-8")
    process = subprocess.Popen(
        command("--json", "r.json", "--html", "r.html"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (folder / "reached").exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    result = load(folder / "r.json")

    assert process.returncode == 130, out + err
    assert result["interrupted"] is True
    assert result["exit_code"] == 130
    assert [case["verdict"] for case in result["cases"]] == ["equivalent"]
    assert load(folder / "reports" / "latest" / "result.json")["cases"] == result["cases"]
    assert (folder / "r.html").is_file()
    assert "Traceback" not in out + err


@pytest.mark.parametrize("flag", ["--json", "--html", "--junit"])
def test_a_path_that_cannot_be_written_is_refused_at_once(run, folder, flag):
    """Before anything runs."""
    (folder / "file").write_text("", encoding="utf-8")
    ran = run(TRAIN, arguments=[flag, "file/below.json"])

    assert ran.code == 2, ran
    assert f"cannot write {flag} file/below.json" in ran.err
    assert "equivalent" not in ran.out


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
def test_a_full_disk_costs_no_verdict(run):
    """The run is printed and kept elsewhere; the failure comes last."""
    ran = run(TRAIN, arguments=["--json", "/dev/full"])

    assert ran.code == 2, ran
    assert "cannot write /dev/full: No space left on device" in ran.err
    assert "equivalent" in ran.out
    assert [case["verdict"] for case in ran.cases] == ["equivalent"] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk to write to")
def test_a_full_disk_hides_no_divergence(run):
    """The exit code is that of what was found."""
    wrong = TRAIN.replace(" / accumulation_steps", "")
    assert wrong != TRAIN
    ran = run(wrong, arguments=["--json", "/dev/full", "--expect", "double-division"])

    assert ran.code == 1, ran
    assert "cannot write /dev/full: No space left on device" in ran.err
    assert "EQ101" in ran.out


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("accum_steps", "accumulation_steps"),
        ("train_dataloader", "loader"),
        ("network", "model"),
        ("per_device_batch_size", "micro_batch_size"),
    ],
)
def test_a_name_of_another_framework_is_understood(run, asked, meant):
    """With a default of its own the loop would never get what was asked for."""
    ran = run(f"def train({asked}):\n    pass\n")

    assert ran.code == 2, ran
    assert f"did you mean {meant}?" in ran.err


def test_one_micro_batch_is_said_to_compare_nothing(run):
    """It is equivalent by itself."""
    ran = run(TRAIN, arguments=["--accumulation-steps", "1"])

    assert ran.code == 0, ran
    assert "K=1: nothing is accumulated" in ran.out


class Tags(HTMLParser):
    """Collects the names of all tags."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)


def test_a_report_is_inert_whatever_names_are_in_it(run, folder):
    """Parameter names and messages are text, in HTML and JSON."""
    source = """
def build():
    model = nn.Module()
    model.register_parameter("<script>alert(1)</script>", nn.Parameter(torch.ones(4, 2)))
    model.register_parameter('"><img src=x onerror=alert(2)>', nn.Parameter(torch.ones(2)))
    def forward(x):
        first, second = model.parameters()
        return x @ first + second
    model.forward = forward
    return model
"""
    ran = run(
        TRAIN.replace("loss / accumulation_steps", "loss"), source, arguments=["--html", "r.html"]
    )
    page = (folder / "r.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)

    assert ran.code == 1, ran
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("<script") == 4  # three of its own, and the data
    assert not tags.found & {"img", "iframe", "object"}
    assert json.loads(json.dumps(ran.result)) == ran.result


# ---- warnings ----------------------------------------------------------------------------------

WARNED = (
    TRAIN.replace("def train", "def old_train")
    + """
import warnings
from torch.optim.lr_scheduler import ConstantLR

def train(model, loader, accumulation_steps):
    warnings.warn("one's own")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ConstantLR(optimizer).step()
    return old_train(model, loader, accumulation_steps)
"""
)


@pytest.mark.parametrize("arguments", [(), ("-j", "2"), ("--world-size", "2")])
def test_what_code_is_warned_of_is_shown_once_at_its_own_line(folder, arguments):
    """Each role runs the code again, and torch blames who called a scheduler: a hook, while it is watched."""
    (folder / "train_step.py").write_text(HEAD + WARNED, encoding="utf-8")
    ran = finished(folder, *arguments)
    lines = ran.err.splitlines()
    own = [line for line in lines if "one's own" in line and "warn(" not in line]
    early = [line for line in lines if "Detected call of `lr_scheduler.step()`" in line]
    processes = 2 if arguments else 1  # two workers, or this process and rank 0
    assert 1 <= len(own) <= processes, ran.err
    assert 1 <= len(early) <= processes, ran.err
    assert all("train_step.py:" in line for line in own + early), ran.err
    assert no_frame_of_ours(ran.err), ran.err
