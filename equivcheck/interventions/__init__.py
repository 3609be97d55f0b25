"""The few things that can be put right in a user's unchanged loop, at the recorder's own hooks.

A cause is proved when putting it right makes the divergence vanish and leaving it wrong does not.
Each intervention is general: it knows cycles and weights, not faults.

K micro-batches per cycle; a *place* is a micro-step in a cycle.
"""

from __future__ import annotations

from equivcheck.interventions.backwards import Addend, Addends, Reweight, Shrink, ordinal_of
from equivcheck.interventions.base import Intervention
from equivcheck.interventions.calls import Defer, Postpone, Ration, Retime, UnscaleFirst
from equivcheck.interventions.copies import Begin, Copies
from equivcheck.interventions.counts import Construct, Length, Rates, Repeat, Shorten
from equivcheck.interventions.ranks import (
    Broadcast,
    FindUnused,
    Maximum,
    NormOfWhole,
    ScaleParts,
    SumOverRanks,
    Synchronise,
    SynchroniseOnce,
    TakeFrom,
)
from equivcheck.interventions.state import (
    Before,
    EvaluateOnce,
    Fresh,
    Hold,
    Rescale,
    Restitute,
    Rewind,
    StillBuffers,
    Supplement,
    ZerosToNone,
)
from equivcheck.interventions.zeroing import Zeroing

__all__ = [
    "Addend",
    "Addends",
    "Before",
    "Begin",
    "Broadcast",
    "Construct",
    "Copies",
    "Defer",
    "EvaluateOnce",
    "FindUnused",
    "Fresh",
    "Hold",
    "Intervention",
    "Length",
    "Maximum",
    "NormOfWhole",
    "Postpone",
    "Rates",
    "Ration",
    "Repeat",
    "Rescale",
    "Restitute",
    "Retime",
    "Reweight",
    "Rewind",
    "ScaleParts",
    "Shorten",
    "Shrink",
    "StillBuffers",
    "SumOverRanks",
    "Supplement",
    "Synchronise",
    "SynchroniseOnce",
    "TakeFrom",
    "UnscaleFirst",
    "Zeroing",
    "ZerosToNone",
    "ordinal_of",
]
