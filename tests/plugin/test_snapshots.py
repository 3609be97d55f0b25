"""What a failing test prints at 80 columns, word by word; `EQUIVCHECK_SNAPSHOTS=write` writes it anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "snapshots"
WRITES = os.environ.get("EQUIVCHECK_SNAPSHOTS") == "write"  # before a test clears the environment
# A test of each outcome; its name is that of the snapshot.
TESTS = {
    "divergence": "equivcheck('EQ103.py', accumulation_steps=4)",
    "declared_but_absent": "equivcheck('good.py', accumulation_steps=2, expect=['EQ201'])",
    "another_cause": "equivcheck('EQ101.py', accumulation_steps=2, expect=['EQ201'])",
    "inconclusive": "equivcheck('inconclusive.py', accumulation_steps=2)",
    "raises": "equivcheck('raises.py', accumulation_steps=2)",
    "unknown_keyword": "equivcheck('good.py', acumulation_steps=2)",
}

# What is left of the headline in pytest's short summary, which is cut at the terminal's width.
SUMMARY = {
    "divergence": "DivergenceError: EQ103 mean-of-mean",
    "declared_but_absent": "DivergenceError: EQ201 batch-stati",
    "another_cause": "DivergenceError: EQ101 missing-divi",
    "inconclusive": "InconclusiveError: inconclusive",
    "raises": "StepError: StepError: train-",
    "unknown_keyword": "UsageError: unknown keyword",
}


def normal(text):
    """Replace what differs from run to run."""
    text = re.sub(r"\bin \d+\.\d+s\b", "in TIME", text)
    text = re.sub(r"\b(case|replay|--equivcheck-replay) [0-9a-f]{10}\b", r"\1 CASE", text)
    text = re.sub(r"^=+ (.*?) =+$", r"=== \1 ===", text, flags=re.MULTILINE)
    text = re.sub(r"(?<= starts ===\n).*?(?=^collected)", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"0x[0-9a-f]+", "ADDRESS", text)
    return re.sub(r"[ ]+$", "", text, flags=re.MULTILINE)


def whole(line):
    """Return whether a line is one that is never wrapped: a headline, whose number stands within 80 columns, a list."""
    if re.match(r"E +expected  one of ", line):
        return True
    return re.match(r"E +\S+Error: (EQ\d{3} [\w-]+: \S+ |unknown keyword)", line[:80]) is not None


@pytest.mark.parametrize("name", TESTS)
def test_a_failure_reads_well(stubbed, name):
    """The whole output is as it was; every line of ours fits, and the summary has code, name and number."""
    found = stubbed(f"def test_it(equivcheck):\n    {TESTS[name]}\n", "-rf")
    text = normal(found.stdout.str())
    path = FOLDER / f"{name}.txt"
    if WRITES:
        path.write_text(text, encoding="utf-8")

    assert path.read_text(encoding="utf-8") == text
    [told] = [line for line in text.splitlines() if line.startswith("FAILED")]
    assert [line for line in text.splitlines() if len(line) > 80 and not whole(line)] == []
    assert re.search(SUMMARY[name], told)
