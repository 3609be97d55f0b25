"""One file per family of causes; each offers `suspect(view)`, which returns suspicions.

A suspicion brings its interventions. A new cause is one new file here and one entry in the
catalogue: the folder itself is the list.
"""

from __future__ import annotations

import importlib
import pkgutil

from equivcheck.errors import EquivcheckError
from equivcheck.view import Suspicion, View


def suspect(view: View) -> list[Suspicion]:
    """Return what every detector suspects, most specific signatures first."""
    found: list[Suspicion] = []
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda each: each.name):
        detector = importlib.import_module(f"{__name__}.{module.name}")
        try:
            found += detector.suspect(view)
        except EquivcheckError:
            # A run that this detector needs cannot be made (single micro-batches, another K): the
            # others still see what they see.
            continue
    return sorted(found, key=lambda each: (each.rank, each.code))
