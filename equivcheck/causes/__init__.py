"""The catalogue of causes: `explain`, the reports, the README and the detection matrix read it."""

from __future__ import annotations

from equivcheck.causes import _coupling, _cycle, _logging, _precision, _ranks, _samples, _scale
from equivcheck.causes._cause import LEGEND, Cause

__all__ = ["CAUSES", "LEGEND", "Cause", "name_of"]

_FAMILIES = (_scale, _coupling, _cycle, _precision, _ranks, _samples, _logging)

CAUSES: dict[str, Cause] = {
    cause.code: cause
    for cause in sorted(
        (cause for family in _FAMILIES for cause in family.CAUSES), key=lambda cause: cause.code
    )
}


def name_of(code: str) -> str:
    """Return the name of a code, or `unknown` for one of a later version."""
    return CAUSES[code].name if code in CAUSES else "unknown"
