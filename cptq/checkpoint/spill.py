"""Keep tensors for later: in memory up to a limit, beyond it in files.

    spill = Spill(limit, folder)
    kept = spill.keep(x)        # x may be let go of
    kept.get()                  # the same values
    parked = spill.park(x)      # x is empty now, whoever holds it
    parked.restore()            # x has its values again

A file holds one tensor, has no name that outlives the process (a directory of its own is removed at
the end; after a kill it is inside the folder that was given), and goes as soon as nothing refers to
what was kept. Values are exact. Limits: tensors on a GPU stay there and are not counted.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


class Spill:
    """A store of tensors.

    Args:
        limit: bytes in memory; None: no limit.
        folder: where the directory of the files is made; the system's own place without.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit = limit
        self._folder = folder
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._count = self.in_memory = 0

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor, which must not change."""
        fits = self.limit is None or self.in_memory + tensor.nbytes <= self.limit
        if fits or tensor.device.type != "cpu":
            return Kept(self, tensor.detach())
        self._count += 1
        path = Path(self._open_directory()) / f"{self._count}.bin"
        whole = tensor.detach().contiguous()
        path.write_bytes(_view_bytes(whole))
        return Kept(self, None, path, tensor)

    @contextmanager
    def reserve(self, nbytes: int) -> Iterator[None]:
        """Keep so much less in memory inside."""
        self.in_memory += nbytes
        try:
            yield
        finally:
            self.in_memory -= nbytes

    def park(self, tensor: Tensor) -> Parked | None:
        """Empty a tensor that others hold too, and do not read, until it is restored.

        Returns:
            None where it stays as it is: there is room for it, or its memory is not its own.
        """
        storage = tensor.untyped_storage()
        fits = self.limit is None or self.in_memory + tensor.nbytes <= self.limit
        if fits or tensor.device.type != "cpu" or not storage.resizable():
            return None
        if storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            return None
        return Parked(tensor, self.keep(tensor))

    def _open_directory(self) -> str:
        if self._directory is None:
            if self._folder is not None:
                self._folder.mkdir(parents=True, exist_ok=True)
            self._directory = tempfile.TemporaryDirectory(
                prefix=".spill-", dir=self._folder, ignore_cleanup_errors=True
            )
        return self._directory.name


class States:
    """A list of tensors, one per batch say, kept by a spill."""

    def __init__(self, spill: Spill, states: Iterable[Tensor] = ()) -> None:
        self._spill = spill
        self._kept = [spill.keep(state) for state in states]

    def append(self, state: Tensor) -> None:
        """Keep one more."""
        self._kept.append(self._spill.keep(state))

    def __getitem__(self, index: int) -> Tensor:
        return self._kept[index].get()

    def __setitem__(self, index: int, state: Tensor) -> None:
        self._kept[index] = self._spill.keep(state)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (kept.get() for kept in self._kept)


class Parked:
    """A tensor whose memory was taken, with its values."""

    def __init__(self, tensor: Tensor, kept: Kept) -> None:
        self._tensor, self._kept = tensor, kept
        self._size = tensor.untyped_storage().nbytes()
        tensor.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Give the tensor its memory and its values again."""
        self._tensor.untyped_storage().resize_(self._size)
        self._kept.read_into(self._tensor)


class Kept:
    """A tensor that was kept."""

    def __init__(
        self,
        spill: Spill,
        tensor: Tensor | None,
        path: Path | None = None,
        like: Tensor | None = None,
    ) -> None:
        self._tensor, self._path = tensor, path
        if tensor is not None:
            size = tensor.nbytes if tensor.device.type == "cpu" else 0
            spill.in_memory += size
            weakref.finalize(self, _give_back, spill, size)
        if path is not None and like is not None:
            self._dtype, self._shape = like.dtype, like.shape
            weakref.finalize(self, path.unlink, missing_ok=True)

    def get(self) -> Tensor:
        """Return the tensor; from a file a new one each time."""
        if self._tensor is not None:
            return self._tensor
        values = torch.empty(self._shape, dtype=self._dtype)
        self.read_into(values)
        return values

    def read_into(self, values: Tensor) -> None:
        """Read a file into a tensor of its shape and type."""
        assert self._path is not None
        with self._path.open("rb") as stream:
            stream.readinto(_view_bytes(values))


def _view_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor, which must be held meanwhile.

    Not by NumPy, after which a tensor could not be parked.
    """
    kind = ctypes.c_char * tensor.nbytes
    return memoryview(kind.from_address(tensor.data_ptr()) if tensor.nbytes else kind()).cast("B")


def _give_back(spill: Spill, size: int) -> None:
    spill.in_memory -= size
