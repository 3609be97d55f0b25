"""One command line in two environments: the same function or not, and which versions they have."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from equivcheck.api import Job, outcomes
from equivcheck.case import Case
from equivcheck.errors import UsageError
from equivcheck.scripts.runner import other_versions
from equivcheck.scripts.target import scripts_of
from tests.scripts.conftest import causes

TRAIN = """
import torch
import objectives

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(3):
    objectives.loss(model(torch.randn(6, 4)), torch.randint(0, 3, (6,))).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
LOSS = """
from torch.nn.functional import cross_entropy
__version__ = "{version}"

def loss(logits, labels):
    return cross_entropy(logits, labels, label_smoothing={smoothing})
"""


@pytest.fixture
def environments(tmp_path):
    """Return two environments that share torch, and have an `objectives` of their own: 1.0 and 2.0."""

    def make(version, smoothing):
        folder = tmp_path / f"env-{version}"
        venv.create(folder, with_pip=False, symlinks=True)
        python = folder / "bin" / "python"
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        out = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True)
        site = Path(out.stdout.strip())
        # Wherever this interpreter has its packages from: an environment may share those of another.
        packages = [each for each in sys.path if Path(each).name == "site-packages"]
        (site / "shared.pth").write_text("\n".join(packages), encoding="utf-8")
        text = LOSS.format(version=version, smoothing=smoothing)
        (site / "objectives.py").write_text(text, encoding="utf-8")
        return folder

    return make


def decided(tmp_path, pair):
    path = tmp_path / "train.py"
    path.write_text(TRAIN, encoding="utf-8")
    [script] = scripts_of(f"python {path}", [], ",".join(map(str, pair)), 8)
    [entry] = outcomes([Job(script, Case(script.target, 1), ())])
    return entry


@pytest.mark.slow
@pytest.mark.timeout(900)  # some twenty processes, each of which loads torch anew
@pytest.mark.parametrize(("smoothing", "verdict"), [(0.0, "equivalent"), (0.1, "divergent")])
def test_a_script_is_compared_under_two_versions(tmp_path, environments, smoothing, verdict):
    """An upgrade that changes the loss is seen, with the versions of both sides."""
    pair = environments("1.0", 0.0), environments("2.0", smoothing)
    entry = decided(tmp_path, pair)

    assert entry["verdict"] == verdict, (entry["headline"], entry["notes"], entry.get("error"))
    assert entry["versions"] == [str(each) for each in pair]
    assert "objectives 1.0 in the full batch's environment, 2.0 in the other" in entry["notes"]
    if verdict == "divergent":
        assert [(code, status) for code, status in causes(entry)] == [("EQ000", "suspected")]


def test_what_differs_between_environments_is_listed():
    one = {"python": "3.11.2", "torch": "2.13.0", "packages": {"a": "1", "b": "2", "only": "1"}}
    other = {"python": "3.12.0", "torch": "2.13.0", "packages": {"a": "1", "b": "3"}}

    assert other_versions(one, other) == [("b", "2", "3"), ("python", "3.11.2", "3.12.0")]


@pytest.mark.parametrize(
    ("versions", "accumulated", "told"),
    [
        ("a", [], "--versions names 1 interpreters"),
        ("nowhere,elsewhere", [], "no-such-interpreter: nowhere"),
        (f"{sys.executable},{sys.executable}", ["python x.py"], "versions-and-accumulated"),
    ],
)
def test_versions_that_make_no_sense_are_refused(versions, accumulated, told):
    with pytest.raises(UsageError, match=told):
        scripts_of("python train.py", accumulated, versions, 8)
