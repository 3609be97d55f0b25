"""The few things that can be put right in a user's unchanged loop, at the recorder's own hooks.

A cause is proved when putting it right makes the divergence vanish and leaving it wrong does not.
Each intervention is general: it knows cycles and weights, not faults.

K micro-batches per cycle; a *place* is a micro-step in a cycle.
"""

from __future__ import annotations

from equivcheck.interventions.backwards import Addend, Addends, Reweight, ordinal_of
from equivcheck.interventions.base import Intervention
from equivcheck.interventions.calls import Defer, Postpone, Ration, Retime, UnscaleFirst
from equivcheck.interventions.counts import Construct, Length, Repeat, Shorten
from equivcheck.interventions.ranks import (
    Broadcast,
    FindUnused,
    NormOfWhole,
    ScaleParts,
    Synchronise,
    SynchroniseOnce,
    TakeFrom,
)
from equivcheck.interventions.state import (
    Before,
    Fresh,
    Hold,
    Rescale,
    Restitute,
    Rewind,
    StillBuffers,
    ZerosToNone,
)

__all__ = [
    "Addend",
    "Addends",
    "Before",
    "Broadcast",
    "Construct",
    "Defer",
    "FindUnused",
    "Fresh",
    "Hold",
    "Intervention",
    "Length",
    "NormOfWhole",
    "Postpone",
    "Ration",
    "Repeat",
    "Rescale",
    "Restitute",
    "Retime",
    "Reweight",
    "Rewind",
    "ScaleParts",
    "Shorten",
    "StillBuffers",
    "Synchronise",
    "SynchroniseOnce",
    "TakeFrom",
    "UnscaleFirst",
    "ZerosToNone",
    "ordinal_of",
]
