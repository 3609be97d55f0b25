"""The shape of a catalogue entry."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One fault that the field knows, described once for every place that shows it.

    Attributes:
        code: `EQnnn`, never reused.
        name: Lower-case words joined by hyphens.
        summary: What is seen, in one line.
        because: The mechanism, in one sentence.
        mathematics: A few lines of plain text; the letters are those of `LEGEND`.
        detected: What in a recording raises the suspicion.
        proved: The intervention that settles it.
        fix: One line of code where one line can do it.
        seen_in_the_wild: Public issues and fixes, `owner/repository#number`.
    """

    code: str
    name: str
    summary: str
    because: str
    mathematics: str
    detected: str
    proved: str
    fix: str
    seen_in_the_wild: tuple[str, ...] = ()


LEGEND = """\
K    micro-batches per optimizer step
p_k  gradient that micro-batch k gives alone
n_k  samples or tokens counted in it; N is their sum
G    gradient of the full batch, sum v_k p_k
A    accumulated gradient, sum w_k p_k; right when w = v"""
