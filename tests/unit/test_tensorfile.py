"""Files of tensors: readable by the library of the format, and refused when they are not whole."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from equivcheck import tensorfile
from equivcheck.errors import UsageError

TENSORS = {
    "weight": torch.arange(6, dtype=torch.float64).view(2, 3),
    "low": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "ids": torch.tensor([[1], [2]], dtype=torch.int32),
    "flag": torch.tensor(True),
    "nothing": torch.zeros(0, 4),
    "transposed": torch.arange(6, dtype=torch.float32).view(2, 3).T,
}


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def test_what_is_written_is_read(tmp_path):
    written = tensorfile.save(tmp_path / "t.safetensors", TENSORS, {"who": "we"})
    found, metadata = tensorfile.load(tmp_path / "t.safetensors", written)

    assert same(found, TENSORS)
    assert metadata == {"who": "we"}
    assert written["bytes"] == (tmp_path / "t.safetensors").stat().st_size


def test_the_library_reads_what_is_written(tmp_path):
    tensorfile.save(tmp_path / "t.safetensors", TENSORS)

    assert same(load_file(tmp_path / "t.safetensors"), TENSORS)


def test_what_the_library_writes_is_read(tmp_path):
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "t.safetensors")

    assert same(tensorfile.load(tmp_path / "t.safetensors")[0], TENSORS)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(UsageError, match="complex128"):
        tensorfile.save(tmp_path / "t.safetensors", {"z": torch.zeros(1, dtype=torch.complex128)})

    assert list(tmp_path.iterdir()) == []


def test_the_old_file_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    """A reader sees the old file or the new one, never a part."""
    path = tmp_path / "t.safetensors"
    tensorfile.save(path, {"a": torch.ones(3)})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorfile.Path, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        tensorfile.save(path, {"b": torch.ones(3)})

    assert list(tensorfile.load(path)[0]) == ["a"]
    assert [each.name for each in tmp_path.iterdir()] == ["t.safetensors"]


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes"),
        (b"1234", "4 bytes"),
        (struct.pack("<Q", 2**40) + b"{}", "its header has"),
        (struct.pack("<Q", 5) + b"{ ...", "not JSON"),
        (header([1, 2]), "no table"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "not understood"),
        (header({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}), "not understood"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}}), "does not fit"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}), "does not fit"),
        (header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "beyond its end"),
    ],
    ids=[
        "empty",
        "short",
        "long-header",
        "no-json",
        "list",
        "keys",
        "dtype",
        "offsets",
        "negative",
        "cut",
    ],
)
def test_a_file_that_is_no_such_file_is_refused_by_name(tmp_path, content, told):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)

    with pytest.raises(UsageError, match=told) as refused:
        tensorfile.load(path)
    assert refused.value.where == str(path)


@pytest.mark.parametrize("change", ["cut", "flip"])
def test_a_changed_file_is_refused(tmp_path, change):
    """Cut short by one byte, or with one bit turned."""
    path = tmp_path / "t.safetensors"
    written = tensorfile.save(path, TENSORS)
    content = bytearray(path.read_bytes())
    if change == "cut":
        content.pop()
    else:
        content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(UsageError, match=r"t\.safetensors"):
        tensorfile.load(path, written)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        tensorfile.load(tmp_path / "none.safetensors")
