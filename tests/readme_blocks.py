"""`python tests/readme_blocks.py README.md` runs the page's example and writes what it prints into the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RIGHT, WRONG = "(loss / accumulation_steps).backward()", "loss.backward()"


def example(page: str) -> str:
    """Return the first Python block of the page: the subject that a newcomer copies."""
    found = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert found is not None
    return found[1]


def printed(source: str) -> str:
    """Return what `equivcheck run train_step.py` prints for a subject, with its exit code."""
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train_step.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-m", "equivcheck", "run", "train_step.py"]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    text = "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip()
    return f"```\n$ equivcheck run train_step.py\n{text}\n$ echo $?\n{done.returncode}\n```"


def blocks(page: str) -> dict[str, str]:
    """Return the text of every generated block, by name."""
    source = example(page)
    assert RIGHT in source
    return {"pass": printed(source), "fail": printed(source.replace(RIGHT, WRONG))}


def between(name: str) -> re.Pattern[str]:
    """Return the pattern of a block's place in the page."""
    return re.compile(rf"(<!-- block: {name} -->\n)(.*?)(<!-- end: {name} -->)", flags=re.DOTALL)


def steady(text: str) -> str:
    """Replace what differs from machine to machine: durations, and the last digits of rounding noise."""
    text = re.sub(r"in \d+\.\d s", "in 0.0 s", text)
    text = re.sub(r"\d\.\de-1\d", "0.0e-16", text)
    return re.sub(r"margin +\d+x", "margin 0x", re.sub(r"python \d+\.\d+\.\d+", "python 3", text))


def updated(page: str) -> str:
    """Return the page with every block as it prints now."""
    for name, text in blocks(page).items():
        page = between(name).sub(lambda found, text=text: f"{found[1]}{text}\n{found[3]}", page)
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(updated(path.read_text(encoding="utf-8")), encoding="utf-8")
