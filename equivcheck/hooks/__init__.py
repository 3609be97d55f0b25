"""What a recorder hangs into torch for one run: one module for each thing that is watched.

Each is a `Hooks` of one `Recorder`: `install` puts its wrappers in place, and the recorder takes them out again.
"""

from __future__ import annotations

from equivcheck.hooks.backwards import Backwards
from equivcheck.hooks.clips import Clips
from equivcheck.hooks.edits import Edits
from equivcheck.hooks.functions import Functions
from equivcheck.hooks.scaling import Scaling
from equivcheck.hooks.schedulers import Schedulers
from equivcheck.hooks.steps import Steps
from equivcheck.hooks.usage import Usage

__all__ = ["Backwards", "Clips", "Edits", "Functions", "Scaling", "Schedulers", "Steps", "Usage"]
