"""Hand objects to rank processes and back: pickles through pipes, tensors beside them as raw bytes.

A reference of many parameters is the same for all ranks and for every run of a case. Its tensors are written once into
one file that each rank maps, so that a rank reads only the pages of its own shards. The file holds numbers only: no
pickle is ever read from a file.
"""

from __future__ import annotations

import io
import mmap
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import cloudpickle
import torch

from equivcheck.recording import Kept
from equivcheck.shelf import Shelf

# Tensors below a page travel inside the message.
INLINE = mmap.PAGESIZE
ALIGNMENT = 64
# A rank keeps so many bytes of a reference in memory while it goes from one parameter to the next.
UNRELEASED = 1 << 24


class Arena:
    """Writes tensors into a file, each once; the side that sends.

    Args:
        path: The file; it is made, and removed by whoever owns its folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._end = 0
        # The tensors themselves are kept, so that no other one can take their identity.
        self._known: dict[int, tuple[torch.Tensor, tuple[Any, ...]]] = {}

    def put(self, tensor: torch.Tensor, kind: str = "arena") -> tuple[Any, ...]:
        """Write a tensor, unless it was written before, and return its reference.

        Args:
            tensor: Of numbers.
            kind: "kept" if nobody writes to it, so that its pages may be given back; else "arena".
        """
        known = self._known.get(id(tensor))
        if known is not None:
            return known[1]
        flat = _bytes_of(tensor)
        self._file.write(bytes(-self._end % ALIGNMENT))
        self._end += -self._end % ALIGNMENT
        reference = (kind, self._end, tensor.dtype, tuple(tensor.shape))
        flat.tofile(self._file)
        self._end += flat.nbytes
        self._known[id(tensor)] = (tensor, reference)
        return reference

    def dumps(self, value: Any, *, remember: bool = True) -> bytes:
        """Return a message; large tensors are left in the file.

        Args:
            value: Functions and classes that cannot be imported elsewhere travel by value.
            remember: Its tensors will be sent again.
        """
        before = set(self._known)
        message = dumps(value, self)
        self._file.flush()
        if not remember:
            # The bytes stay in the file; the tensors need not be kept alive for them.
            for key in set(self._known) - before:
                del self._known[key]
        return message

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._known.clear()


class Mapped:
    """Reads tensors out of an arena's file; the side that receives.

    Tensors are private copies on write: what is written to one stays in this process. Those of a reference, to which
    nobody writes, are mapped apart: their memory is given back after every step that was compared with them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._maps: dict[str, mmap.mmap] = {}
        self._outgrown: list[mmap.mmap] = []
        self._read = 0

    def get(
        self, kind: str, offset: int, dtype: torch.dtype, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return the tensor at an offset.

        Args:
            kind: As in `Arena.put`.
            offset: First byte in the file.
            dtype: Of the tensor.
            shape: Of the tensor.
        """
        count = 1
        for size in shape:
            count *= size
        end = offset + count * dtype.itemsize
        known = self._maps.get(kind)
        if known is None or len(known) < end:
            if known is not None and kind == "kept":
                self._outgrown.append(known)
            with self._path.open("rb") as file:
                known = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[kind] = known
        return torch.frombuffer(known, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self, read: int | None = None) -> None:
        """Give the memory of a reference's tensors back; it is read again when it is looked at.

        Args:
            read: Bytes read since the last call: a few are kept. None gives back at once.
        """
        self._read += read or 0
        if read is not None and self._read < UNRELEASED:
            return
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            for each in (*self._outgrown, *(m for k, m in self._maps.items() if k == "kept")):
                each.madvise(mmap.MADV_DONTNEED)


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _is_plain(value: Any) -> bool:
    """Tell a tensor of numbers from one that only pickle knows how to take apart.

    One on a GPU arrives on the cpu: a rank has a GPU of its own, or a part of the model.
    """
    return (
        type(value) is torch.Tensor
        and value.layout == torch.strided
        and value.device.type in {"cpu", "cuda"}
        and not value.requires_grad
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def _tensors_of(kept: Kept) -> Iterator[torch.Tensor]:
    for each in (kept.gradients, kept.applied, kept.after, kept.buffers, kept.shadows):
        yield from (tensor for tensor in each.values() if tensor is not None)
    for entries in kept.state.values():
        yield from (value for value in entries.values() if isinstance(value, torch.Tensor))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: io.BytesIO, arena: Arena | None) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._arena = arena
        self._kept: set[int] = set()
        self.shelves: list[Shelf] = []
        self._alive: list[torch.Tensor] = []  # an identity must not be taken by another meanwhile

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Kept):
            self._kept.update(id(each) for each in _tensors_of(value))
        if isinstance(value, MethodType) and isinstance(value.__self__, Shelf):
            return getattr, (value.__self__, value.__name__)
        return super().reducer_override(value)

    def persistent_id(self, value: Any) -> Any:
        if isinstance(
            value, Shelf
        ):  # Elsewhere it is the mapped file whose memory is to be given back.
            self.shelves.append(value)
            return ("shelf", 0, None, ())
        if not _is_plain(value) or not value.numel():
            return None
        if self._arena is not None and value.numel() * value.element_size() >= INLINE:
            return self._arena.put(value, "kept" if id(value) in self._kept else "arena")
        # The identity tells the other side which tensors are one and the same.
        self._alive.append(value)
        return ("inline", id(value), value.dtype, tuple(value.shape), _bytes_of(value).tobytes())


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, mapped: Mapped | None) -> None:
        super().__init__(file)
        self._mapped = mapped
        self._seen: dict[Any, torch.Tensor] = {}

    def persistent_load(self, reference: Any) -> Any:
        kind, place, dtype, shape, *content = reference
        if kind == "shelf":
            return self._mapped if self._mapped is not None else Shelf()
        if (kind, place) not in self._seen:
            if kind == "inline":
                buffer = bytearray(content[0])
                tensor = torch.frombuffer(buffer, dtype=dtype).view(shape)
            else:
                assert self._mapped is not None
                tensor = self._mapped.get(kind, place, dtype, shape)
            self._seen[kind, place] = tensor
        return self._seen[kind, place]


def dumps(value: Any, arena: Arena | None = None) -> bytes:
    """Return a message that `loads` turns back into the value."""
    file = io.BytesIO()
    pickler = _Pickler(file, arena)
    pickler.dump(value)
    for shelf in pickler.shelves:
        shelf.release()
    return file.getvalue()


def loads(message: bytes, mapped: Mapped | None = None) -> Any:
    """Return what a message from another process of ours holds."""
    return _Unpickler(io.BytesIO(message), mapped).load()
