"""What ranks send each other is what the committed table says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATED = json.loads((ROOT / "reports" / "traffic.json").read_text(encoding="utf-8"))


def _rows() -> list[object]:
    return [
        pytest.param(
            row,
            id=f"{row['loop']}-R{row['world_size']}-K{row['accumulation_steps']}",
        )
        for row in STATED
    ]


@pytest.mark.slow
@pytest.mark.parametrize("row", _rows())
def test_the_table_is_measured_again(row: dict) -> None:
    """Collectives and bytes of a loop at one point, counted by gloo itself, are those of the table."""
    script = ROOT / "tests" / "bench" / "traffic.py"
    at = [row["loop"], str(row["world_size"]), str(row["accumulation_steps"])]

    out = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--one", *at],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout

    assert row == json.loads(out.splitlines()[-1])


def test_no_sync_reduces_once_and_its_absence_k_times() -> None:
    """C19: K all-reduces of all parameters without no_sync, one with it, at every K and number of ranks."""
    counts = {
        (row["loop"], row["world_size"], row["accumulation_steps"]): row["collectives"][
            "all_reduce"
        ]
        for row in STATED
        if row["loop"].startswith("DDP")
    }

    for (loop, _, k), (count, size) in counts.items():
        expected = 1 if "no_sync" in loop else k
        assert (expected, expected * 4 * 9576) == (count, size)


def test_fsdp_without_communication_still_reduces_and_gathers() -> None:
    """C23: not 0 collectives; one reduction of all parameters per cycle, and gathering in every micro-batch."""
    for row in STATED:
        if row["loop"] in {"FSDP1, no_sync", "FSDP2, without communication"}:
            assert row["collectives"]["all_reduce"][1] == 4 * row["parameters"]
            assert row["collectives"]["all_gather"][0] >= row["accumulation_steps"]


def test_the_page_holds_the_measurements() -> None:
    """The committed page is made from the committed numbers."""
    page = (ROOT / "reports" / "traffic.md").read_text(encoding="utf-8")

    for row in STATED:
        total = sum(size for _, size in row["collectives"].values())
        start = f"| {row['loop']} | {row['world_size']} | {row['accumulation_steps']} |"
        [line] = [each for each in page.splitlines() if each.startswith(start)]
        assert line.endswith(f"| {total} |")
