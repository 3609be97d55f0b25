"""Suites and fixtures, where a wheel carries them; in a clone they lie beside the package.

In both they are imported as `equivcheck._bundled.fixtures`: a user's own folder may be called `fixtures` as well.
"""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).resolve().parent
if not (_here / "fixtures").is_dir():
    __path__.append(str(_here.parents[1]))
