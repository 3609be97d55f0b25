"""What processes tell each other is JSON and tensors, and comes back as it was."""

from __future__ import annotations

import json

import pytest
import torch

from equivcheck.attach.codec import Unencodable, decode, encode
from equivcheck.attach.spec import Spec, adopt_states, states_of
from equivcheck.differences import Sums
from equivcheck.freeze import Fingerprint, Freeze, Seen
from equivcheck.interventions import Before, Defer, Restitute, Reweight
from equivcheck.recording import Event, Place, Step
from equivcheck.sampled import Tray, packed


def there_and_back(value, known=()):
    tensors = {}
    text = json.dumps(encode(value, tensors, known=known))
    return decode(json.loads(text), tensors, known=known), tensors


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [1, 2.5, "x", float("inf")],
        (1, (2, 3)),
        {"a": {"b": [()]}},
        {(0, 3): 1, (1, 4): 2},
        {"$": 1},
        {1, 2},
        frozenset({(0, 1)}),
        torch.float16,
        Place(0, 1, 4, last=True),
        Event("clip", 2, 3, {"max_norm": 1.0}),
        Sums(1.0, 2.0, 3.0, 4, finite=False),
        Step(0, "SGD", frozenset({(0, 1)}), 4, 0, [0.1], gradients={"w": Sums(1.0)}),
    ],
    ids=repr,
)
def test_a_value_comes_back(value):
    assert there_and_back(value)[0] == value


@pytest.mark.parametrize("count", [0, 1, 8, 9, 100])
def test_a_tensor_comes_back_exactly(count):
    value = torch.randn(count, generator=torch.Generator().manual_seed(count)).double() / 3

    assert torch.equal(there_and_back({"x": value})[0]["x"], value)


def test_vectors_of_many_names_come_back_and_name_their_layout_once():
    """What is packed is one tensor in its own dtype, and reads as float64 vectors by name."""
    tray = Tray()
    first = packed(
        {"a": torch.randn(20), "none": None, "b": torch.ones(0), "c": torch.randn(3)}, tray
    )
    second = packed(
        {"a": torch.randn(20), "none": None, "b": torch.ones(0), "c": torch.randn(3)}, tray
    )
    other = packed({"a": torch.randn(30, dtype=torch.bfloat16), "c": torch.randn(3).double()}, tray)
    found, tensors = there_and_back([first, second, other])

    assert [each.dtype for each in tensors.values()] == [torch.float32] * 2 + [torch.float64]
    for was, now in zip([first, second, other], found, strict=True):
        assert [*was] == [*now]
        assert len(was) == len(now)
        assert all(
            was[name] is None is now[name] or torch.equal(was[name], now[name]) for name in was
        )
        assert all(now[name] is None or now[name].dtype == torch.float64 for name in now)
    assert found[0]["none"] is None
    with pytest.raises(KeyError):
        found[0]["d"]
    assert json.dumps(encode([first, second], {})).count("none") == 1
    kept = float(first.numbers.sum())
    nothing, empty = packed({"none": None}, tray), packed({"b": torch.ones(0)}, tray)
    assert (dict(nothing), len(nothing), empty["b"].shape) == ({"none": None}, 1, (0,))
    large = packed({"a": torch.ones(3), "b": torch.full((5_000_000,), 2.0)}, tray)
    assert (float(large["b"].sum()), float(first.numbers.sum())) == (1e7, kept)  # in another block


def test_one_tensor_in_two_places_is_written_once_and_stays_one():
    shared = torch.ones(100)
    found, tensors = there_and_back({"gradients": shared, "applied": [shared]})

    assert found["applied"][0] is found["gradients"]
    assert list(tensors) == ["gradients"]


def test_a_module_has_no_place_in_a_recording():
    with pytest.raises(Unencodable, match="Linear"):
        encode({"model": torch.nn.Linear(1, 1)}, {})


def test_an_intervention_is_named_by_its_place():
    chosen = (Defer("clip"), Reweight({0: [1.0]}))
    found, _ = there_and_back({(chosen, 2): "learned"}, known=chosen)

    assert next(iter(found))[0] == chosen


def test_interventions_of_another_process_know_what_they_were_told(tmp_path):
    """Factors, tensors, and what one has learned in an earlier run; the class is one of ours."""
    freeze = Freeze({(0, 1): 0})
    freeze._learned = {((freeze,), 0): [(torch.ones(20), torch.zeros(20))]}
    chosen = [
        Defer("zero_grad", "clip"),
        Reweight({0: [0.5, 2.0]}, frozenset({"w"})),
        Restitute({"w": {4: (2, torch.arange(30.0))}}),
        Before(),
        freeze,
    ]
    spec = Spec(
        "candidate", "out", "compare", interventions=chosen, schedule=[Place(0, 0, 1, True)]
    )
    spec.write(tmp_path / "spec.json")
    found = Spec.read(tmp_path / "spec.json")
    defer, reweight, restitute, _, frozen = found.interventions

    assert defer._kinds == ("zero_grad", "clip")
    assert reweight._factors == {0: [0.5, 2.0]}
    assert reweight._names == frozenset({"w"})
    backwards, missing = restitute._changes["w"][4]
    assert backwards == 2
    assert torch.equal(missing, torch.arange(30.0))
    assert list(frozen._learned) == [((frozen,), 0)]
    assert found.schedule == spec.schedule


def test_what_rows_looked_like_in_another_process_is_known_here():
    """Whether a module couples rows is seen by comparing two runs of a script, each a process of its own."""
    alone, full = Fingerprint({}), Fingerprint({})
    place = ("body.1", 0, (0, 3), 8)
    row = Seen(7, torch.tensor([1.0, 2.0]), torch.arange(20.0).double(), torch.ones(2))
    full._full[place] = row
    tensors = {}
    states = json.loads(json.dumps(states_of([full], tensors)))
    adopt_states([alone], states, tensors)

    found = alone._full[place]
    assert found.order == row.order
    for name in ("output", "given", "weights"):
        assert torch.equal(getattr(found, name), getattr(row, name))


def test_a_specification_names_no_other_class(tmp_path):
    Spec("candidate", "out", "compare", interventions=[Before()]).write(tmp_path / "spec.json")
    text = (tmp_path / "spec.json").read_text()
    (tmp_path / "spec.json").write_text(
        text.replace("equivcheck.interventions.state:Before", "os:system")
    )

    with pytest.raises(ValueError, match="no intervention"):
        Spec.read(tmp_path / "spec.json")
