"""Tensors in files of the safetensors format: written atomically, checked before a byte of them is used.

The format is 8 bytes with the length of a JSON header, the header (dtype, shape and place of every tensor), and the
numbers themselves. Nothing in it can be executed. It is written here and not by the library of that name because a
script's own environment has torch and need not have the library; a test reads each with the other.

Source: the format's description, https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from equivcheck.errors import UsageError

__all__ = ["load", "save"]

_NAMES: Final[dict[torch.dtype, str]] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
# The library refuses longer headers; one of ours has about 100 bytes per tensor.
_LONGEST_HEADER: Final = 100_000_000


def save(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Write tensors so that a reader sees the whole file or none, and return its size and checksum.

    Args:
        path: Where to; the folder exists.
        tensors: By name; any dtype of the format, any device. complex128 has no place in it and is refused.
        metadata: Text beside the tensors.

    Returns:
        `bytes` and `crc32` of the file.

    Raises:
        UsageError: A dtype that the format does not know.
        OSError: The file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UsageError(
                f"no-such-dtype: {name} is {tensor.dtype}, which safetensors does not hold",
                where=str(path),
            )
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    checksum = 0
    try:
        with draft.open("wb") as file:
            for part in (struct.pack("<Q", len(text)), text):
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            for tensor in tensors.values():
                plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                checksum = zlib.crc32(plain.data, checksum)
                file.write(plain.data)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return {"bytes": 8 + len(text) + begin, "crc32": checksum}


def load(
    path: Path, written: Mapping[str, int] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of a file and its metadata; pages are read when they are looked at.

    Args:
        path: The file.
        written: `bytes` and `crc32` as `save` returned them, to be checked.

    Raises:
        UsageError: The file is missing, cut short or corrupted; the message names it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise refused(path, f"it has {size} bytes")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise refused(path, str(error.strerror)) from None
    if written is not None:
        if size != written["bytes"]:
            raise refused(path, f"it has {size} bytes of {written['bytes']}")
        if zlib.crc32(mapped) != written["crc32"]:
            raise refused(path, "its checksum is another one")
    (length,) = struct.unpack("<Q", mapped[:8])
    if length > min(_LONGEST_HEADER, size - 8):
        raise refused(path, f"its header has {length} bytes, the file {size}")
    try:
        header = json.loads(mapped[8 : 8 + length])
    except ValueError:
        raise refused(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise refused(path, "its header is no table")
    metadata = header.pop("__metadata__", {})
    start = 8 + length
    return {
        name: _tensor(path, mapped, start, name, entry) for name, entry in header.items()
    }, dict(metadata)


def _tensor(path: Path, mapped: mmap.mmap, start: int, name: str, entry: Any) -> torch.Tensor:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = [int(each) for each in entry["shape"]]
        begin, end = (int(each) for each in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise refused(path, f"the entry of {name} is not understood") from None
    count = math.prod(shape)
    if min(shape, default=0) < 0 or end - begin != count * dtype.itemsize or begin < 0:
        raise refused(path, f"the place of {name} does not fit its shape")
    if start + end > len(mapped):
        raise refused(path, f"{name} lies beyond its end")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin).view(shape)


def refused(path: Path, why: str) -> UsageError:
    """Return the error for a file of a recording that cannot be relied on."""
    return UsageError(
        f"corrupt-recording: {path.name} cannot be read: {why}",
        where=str(path),
        expected="a file as equivcheck wrote it",
        because="it was cut short, changed, or is not one of ours",
        fix="record again",
    )
