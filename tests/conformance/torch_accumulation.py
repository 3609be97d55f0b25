"""Every schedule of torch.distributed.pipelining against the full batch in one process, on two ranks.

Prints one JSON object: for each schedule and K, the verdict and the relative error of the gradients.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.pipelining import schedules

SUBJECT = Path(__file__).with_name("pipeline_subject.py")


def names() -> list[str]:
    """Return the schedules that can be made, as torch names them."""
    found = inspect.getmembers(schedules, inspect.isclass)
    made = [name for name, each in found if issubclass(each, schedules._PipelineSchedule)]
    return [
        n
        for n in made
        if n.startswith("Schedule") and not inspect.isabstract(getattr(schedules, n))
    ]


def run(name: str) -> dict[str, str]:
    """Return what a schedule gives at K = 4 and 8."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [
            sys.executable,
            "-m",
            "equivcheck",
            "run",
            str(SUBJECT),
            "-q",
            "--json",
            str(out),
        ]
        command += ["--accumulation-steps", "4,8", "--world-size", "2", "--strategy", "pipeline"]
        subprocess.run(
            [*command, "--timeout", "300"],
            env={**os.environ, "SCHEDULE": name},
            check=False,
            capture_output=True,
        )
        cases = json.loads(out.read_text())["cases"] if out.exists() else []
    return {f"{name} K={case['accumulation_steps']}": said(case) for case in cases} or {
        name: "no result"
    }


def said(case: dict[str, Any]) -> str:
    """Return a case's verdict, and how far its gradients are from the full batch's."""
    gradients = (case.get("divergence") or {}).get("gradients") or {}
    if case["verdict"] == "equivalent":
        return f"equivalent, gradients {gradients['relative']:.1e}"
    return f"{case['verdict']}: {case['headline']}"


def main() -> None:
    """Print what every schedule gives."""
    print(
        json.dumps({case: words for name in names() for case, words in run(name).items()}, indent=1)
    )


if __name__ == "__main__":
    main()
