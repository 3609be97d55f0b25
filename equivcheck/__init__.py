"""equivcheck: does accumulating micro-batches give the update that the full batch gives?"""

from __future__ import annotations
