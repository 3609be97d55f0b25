"""One word for one thing, in code and prose alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEVER = {
    r"\bgrad_acc\w*|\bgrad[- ]accum\b|gradient_accumulation_steps": "accumulation_steps",
    r"\bmini[-_ ]?batch|\bmicrobatch|\bmicro batch": "micro_batch, micro-batch in prose",
    r"\bbig[-_ ]batch|\bbaseline_(run|gradient)": "full_batch",
    r"\btotal[-_]batch(_size)?\b": "effective_batch_size",
    r"\bworldsize\b|\bnum_ranks\b|\bn_ranks\b": "world_size",
    r"\bmulti[-_ ]?gpu steps?\b": "optimizer_step",
}


def pages():
    for pattern in ("equivcheck/**/*.py", "*.md", "suites/**/*.py", "tests/cli/**/*.py"):
        yield from ROOT.glob(pattern)


def wrong_words(text):
    return {
        right: m[0]
        for wrong, right in NEVER.items()
        if (m := re.search(wrong, text, re.IGNORECASE))
    }


@pytest.mark.parametrize("path", sorted(pages()), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_uses_another_word(path):
    """The names of other projects are quoted in fixtures only."""

    assert wrong_words(path.read_text(encoding="utf-8")) == {}


@pytest.mark.parametrize("text", ["grad_acc = 4", "a minibatch", "Micro batch", "total_batch_size"])
def test_a_planted_word_is_found(text):
    """The test above can fail."""

    assert wrong_words(text)
