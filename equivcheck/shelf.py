"""Keep the tensors of the reference: in memory, and in mapped files once they are many bytes."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch

# Beyond this many bytes the reference lives in memory-mapped files (removed with the run): five million float64
# parameters with gradients and two moments, one step. Below it nothing is written; above it one step's is in memory.
IN_MEMORY = 64 * 2**20


class Shelf:
    """Keeps copies of tensors: in memory, and in files once they are many bytes.

    A file is mapped, so that it takes memory while it is read and none after `release`.
    """

    def __init__(self) -> None:
        self._bytes = 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._maps: list[mmap.mmap] = []
        self._read = 0

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy, of the same dtype and shape; it must not be written to."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if self._bytes + size <= IN_MEMORY or size < mmap.PAGESIZE:
            self._bytes += size
            return tensor.clone()
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="equivcheck-")
        path = Path(self._folder.name) / f"{len(self._maps)}.bin"
        with path.open("w+b") as file:
            # Written, not copied into the mapping: those pages would count as this process's until they are on disk.
            tensor.cpu().reshape(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._maps.append(mapped)
        return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)

    def release(self, read: int | None = None) -> None:
        """Give the memory of mapped pages back; they are read again when they are looked at.

        Args:
            read: Bytes read since the last call: given back once they are as many as stay in memory anyway, for each
                time costs a system call per tensor on the shelf. None gives back at once.
        """
        self._read += read or 0
        if read is not None and self._read < IN_MEMORY:
            return
        self._read = 0
        if hasattr(mmap, "MADV_DONTNEED"):
            for each in self._maps:
                each.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Remove the files."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
