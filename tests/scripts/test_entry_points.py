"""However a script is started, its training process is watched: modules, shells, wrappers, children."""

from __future__ import annotations

import os
import sys
import textwrap

import pytest

from equivcheck.attach.launch import launch, words_of
from equivcheck.attach.spec import Spec
from equivcheck.attach.store import load

slow = pytest.mark.slow

TRAIN = """
import argparse, os, sys
import torch
from torch.utils.data import DataLoader, TensorDataset

def main(workers=0):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(torch.randn(12, 3)), 4, num_workers=workers)
    for (x,) in loader:
        model(x).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("trained", *sys.argv[1:], os.environ.get("MINE", ""), flush=True)

if __name__ == "__main__":
    main()
"""
CHDIR = (
    "import os, tempfile; os.chdir(tempfile.mkdtemp()); import trainer.loop; trainer.loop.main()"
)
CHILD = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-m', 'trainer', 'child']).returncode)"
SPAWN = """
import torch.multiprocessing as mp
from trainer.loop import main

def work(rank):
    main()

if __name__ == "__main__":
    mp.spawn(work, nprocs=1)
"""
NOISY = "import trainer.loop; [print('x' * 100) for _ in range(30_000)]; trainer.loop.main()"


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return a function that starts a command line in a folder with a package, and returns its recording."""
    package = tmp_path / "trainer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "loop.py").write_text(TRAIN, encoding="utf-8")
    (package / "__main__.py").write_text(
        "from trainer.loop import main\nmain()\n", encoding="utf-8"
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "train": f"#!{sys.executable}\nimport sys\nfrom trainer.loop import main\nsys.exit(main())\n",
        "runner": '#!/bin/sh\nexec "$@"\n',
        "train.sh": f'#!/bin/sh\nset -e\ncd /\nexport MINE=2\n{sys.executable} -m trainer "$@"\n',
    }.items():
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tools), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(line, source=None):
        if source is not None:
            (tmp_path / "script.py").write_text(textwrap.dedent(source), encoding="utf-8")
        words, variables = words_of(line.replace("python", sys.executable))
        folder = tmp_path / "run"
        asked = Spec("recorded", str(folder / "ranks"), "watch", neutral=False, ends=False)
        ended = launch(words, asked, folder, variables=variables)
        ranks = sorted(each.name for each in (folder / "ranks").glob("*"))
        assert ranks == ["rank-0"], (ranks, ended)
        return ended, load(folder / "ranks" / "rank-0", finished=False)

    return start


@pytest.mark.parametrize(
    ("line", "source", "said"),
    [
        pytest.param("python -m trainer a b", None, "trained a b", id="module"),
        pytest.param("python -c 'import trainer.loop as t; t.main()'", None, "trained", id="-c", marks=slow),
        pytest.param("train a", None, "trained a", id="console script", marks=slow),
        pytest.param("sh -c 'MINE=1 python -m trainer \"a b\"'", None, "trained a b 1", id="sh -c", marks=slow),
        pytest.param("env MINE=1 python -m trainer", None, "trained 1", id="env", marks=slow),
        pytest.param("MINE=1 python -m trainer", None, "trained 1", id="assignment", marks=slow),
        pytest.param("runner python -u -m trainer", None, "trained", id="wrapper", marks=slow),
        pytest.param("train.sh a", None, "trained a 2", id="shell script"),
        pytest.param("python script.py", CHDIR, "trained", id="chdir", marks=slow),
        pytest.param("python script.py", CHILD, "trained child", id="subprocess", marks=slow),
        pytest.param("python script.py", SPAWN, "trained", id="multiprocessing", marks=slow),
        pytest.param("python script.py", NOISY, "trained", id="much output", marks=slow),
        pytest.param(
            "python script.py",
            "import trainer.loop\nif __name__ == '__main__': trainer.loop.main(workers=2)",
            "trained",
            id="workers of a loader",
        ),
    ],
)  # fmt: skip
def test_the_process_that_trains_is_found(started, line, source, said):
    ended, (recording, facts) = started(line, source)

    assert ended.code == 0, ended
    assert ended.output.rstrip().endswith(said)
    assert [len(recording.steps), facts.ended] == [3, "exit"]


COMPILED = """
import torch
torch.manual_seed(0)
model = torch.compile(torch.nn.Linear(3, 1), backend="aot_eager")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(4, 3)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@slow
def test_a_compiled_model_keeps_the_names_of_its_parameters(started):
    _, (recording, _) = started("python script.py", COMPILED)

    assert [*recording.optimizers.values()] == [["weight", "bias"]]
    assert len(recording.steps) == 3
