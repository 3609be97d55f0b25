"""Subjects given in parts, as paths and as modules; and what a check leaves of the caller's modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import equivcheck
from equivcheck.subject import Parts, load_subject

SUBJECT = """\
import torch
import {helper}

def build():
    return torch.nn.Linear(3, 1)

def batches():
    return [{{"x": torch.ones(4, 3) * torch.arange(4.0)[:, None], "y": torch.ones(4, 1)}}]

def train(model, loader, accumulation_steps):
    import {helper} as again
    assert again is {helper}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(loader):
        loss = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        (loss / accumulation_steps).backward()
        if (step + 1) % accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
"""


def build():
    return nn.Linear(3, 1)


def batches():
    return [{"x": torch.randn(4, 3), "y": torch.randn(4, 1)} for _ in range(2)]


def loop(divide):
    def train(model, loader, accumulation_steps):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step, batch in enumerate(loader):
            loss = nn.functional.mse_loss(model(batch["x"]), batch["y"])
            (loss / (accumulation_steps if divide else 1)).backward()
            if (step + 1) % accumulation_steps == 0:
                optimizer.step()
                optimizer.zero_grad()

    return train


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a subject and a helper that has been imported already."""
    (tmp_path / "parts_subject.py").write_text(
        SUBJECT.format(helper="parts_helper"), encoding="utf-8"
    )
    (tmp_path / "parts_helper.py").write_text("VALUE = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("parts_helper", None)


def test_closures_are_a_subject():
    """Functions are as good as a file, and are named after the loop."""
    found = equivcheck.check(build=build, batches=batches, train=loop(divide=True))

    assert found.verdict == "equivalent"
    assert found.cases[0]["target"].endswith("loop.<locals>.train")


def test_batches_may_be_the_batches_themselves():
    """A list needs no function around it."""
    found = equivcheck.measure(build=build, batches=batches(), train=loop(divide=False))

    assert found.worst["causes"][0]["code"] == "EQ101"


def test_parts_replace_those_of_a_target():
    """What is given wins over what the target has, as `train` on the command line."""
    target = SimpleNamespace(build=build, batches=batches, train=loop(divide=True))

    assert equivcheck.measure(target, accumulation_steps=2).verdict == "equivalent"
    worse = equivcheck.measure(target, train=loop(divide=False), accumulation_steps=2)
    assert worse.verdict == "divergent"


def test_a_module_is_taken_as_it_is():
    """What a test has replaced in a module stays replaced, so it is not executed again."""
    module = ModuleType("made_here")
    module.build, module.batches, module.train = build, batches, loop(divide=False)
    subject = load_subject(module)

    assert (subject.target, subject.repeatable) == ("made_here", False)
    assert equivcheck.measure(module, accumulation_steps=2).verdict == "divergent"


def test_a_path_is_a_target(folder):
    """`pathlib.Path` and text are the same."""
    found = equivcheck.check(folder / "parts_subject.py", accumulation_steps=2)

    assert found.cases[0]["target"] == str(folder / "parts_subject.py")


def test_several_values_of_an_axis_are_several_cases():
    """Each combination is a case of its own."""
    found = equivcheck.measure(
        build=build,
        batches=batches,
        train=loop(divide=True),
        accumulation_steps=[2, 4],
        split=["even", "uneven"],
    )

    assert [(c["split"], c["accumulation_steps"]) for c in found.cases] == [
        ("even", 2),
        ("even", 4),
        ("uneven", 2),
        ("uneven", 4),
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "no-subject: there is no target, and no build= and no batches= and no train="),
        ({"build": build, "train": loop(divide=True)}, "no-subject: .* no batches="),
        ({"build": nn.Linear(3, 1), "batches": batches, "train": build}, "build= is Linear"),
        ({"build": build, "batches": batches, "train": 3}, "train= is int"),
    ],
    ids=["nothing", "a-part-missing", "a-model-for-build", "a-number"],
)
def test_incomplete_parts_are_refused(given, told):
    """With the part that is missing or wrong."""
    with pytest.raises(equivcheck.UsageError, match=told):
        equivcheck.measure(**given)


def test_a_divergence_carries_its_result():
    """Whoever catches the error has the data; its name is the public one."""
    with pytest.raises(equivcheck.DivergenceError) as raised:
        equivcheck.check(build=build, batches=batches, train=loop(divide=False))

    assert raised.value.result.verdict == "divergent"
    assert f"{type(raised.value).__module__}.{type(raised.value).__name__}" == (
        "equivcheck.DivergenceError"
    )


def test_the_callers_modules_survive(folder):
    """What was imported before a check is the same object after it, and nothing is left of the check's own."""
    helper = importlib.import_module("parts_helper")
    helper.VALUE = 2
    path = list(sys.path)
    equivcheck.check(str(folder / "parts_subject.py"), accumulation_steps=2)

    assert sys.modules["parts_helper"] is helper
    assert helper.VALUE == 2
    assert "parts_subject" not in sys.modules
    assert sys.path == path


def test_a_package_keeps_its_modules(tmp_path, monkeypatch):
    """The attribute of a package that an import sets is put back, too."""
    package = tmp_path / "parts_package"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "aid.py").write_text("", encoding="utf-8")
    helper = "parts_package.aid"
    (package / "step.py").write_text(
        SUBJECT.format(helper=helper).replace(f"is {helper}", "is again"), encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    aid = importlib.import_module(helper)
    whole = sys.modules["parts_package"]
    for target in ("parts_package.step", str(package / "step.py")):
        equivcheck.check(target, accumulation_steps=2)

        assert sys.modules["parts_package"] is whole
        assert whole.aid is aid is sys.modules[helper]
        assert not hasattr(whole, "step")


def test_every_run_still_executes_the_file_again(folder):
    """Putting modules back does not let one run's state reach the next."""
    (folder / "parts_helper.py").write_text("ran = []\n", encoding="utf-8")
    once = "    parts_helper.ran.append(1)\n    assert len(parts_helper.ran) == 1\n"
    source = SUBJECT.format(helper="parts_helper").replace(
        "    optimizer =", f"{once}    optimizer ="
    )
    (folder / "parts_subject.py").write_text(source, encoding="utf-8")

    assert equivcheck.check(str(folder / "parts_subject.py")).verdict == "equivalent"


def test_a_name_stands_for_parts_in_the_result():
    """A front end may call a subject by what its reader knows."""
    subject = load_subject(Parts(None, build, batches, loop(divide=True), name="here::it"))

    assert subject.target == "here::it"
