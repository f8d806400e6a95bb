"""Give memory back to the system: pages of mapped weight files once they have been read, the heap.

glibc keeps what was freed for later use: tensors of up to 32 MB come from a heap that seldom
shrinks, and lies in pieces after a while. `return_large_tensors` has every large tensor mapped on
its own, so that it goes when it is freed.

Pages that a process has touched count as its memory until the system takes them back, which it
does when memory is short. `madvise(MADV_DONTNEED)` gives them back at once: of a file that is
mapped and was not changed nothing is lost, as the next access reads it again. Of memory that is not
a file's, or that was written to, it would destroy the content, so only ranges that /proc/self/maps
shows as mapped from one of the given files are touched, and weights are never written in place.

Limits: Linux; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

_MADV_DONTNEED = 4
#: glibc's name for the size from which memory is mapped on its own, and that size here: less would
#: cost page faults for tensors that come and go all the time
_MMAP_THRESHOLD, LARGE = -3, 4 << 20


def return_large_tensors() -> None:
    """Have the memory of tensors of `LARGE` bytes and more go back when they go; glibc alone can.

    smollm2-135m, `--max-memory 1.3GB`: 1.27 instead of 1.63 GB after 9 blocks.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_MMAP_THRESHOLD, LARGE)


def trim_heap() -> None:
    """Give memory back that was freed and lies between pieces in use; glibc alone knows how.

    Tensors of some megabytes come from a heap that otherwise only grows.
    """
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


class MappedFiles:
    """Where files are mapped in the memory of this process; without `files` all that are."""

    def __init__(self, files: Iterable[Path] | None = None) -> None:
        paths = None if files is None else {str(file.resolve()) for file in files}
        self._ranges = _find_ranges(paths)
        self._advise = ctypes.CDLL(None).madvise if self._ranges else None

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedFiles:
        """Return itself: a copied model has its weights on the same pages."""
        return self

    def drop_pages(self, tensor: Tensor) -> None:
        """Give back the whole pages of a tensor that lies in a mapped file; else do nothing."""
        if self._advise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        begin, page = tensor.data_ptr(), mmap.PAGESIZE
        end = begin + tensor.nbytes
        if not any(low <= begin and end <= high for low, high in self._ranges):
            return
        first, last = -(-begin // page) * page, end // page * page
        if first < last:
            self._advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)


def _find_ranges(paths: set[str] | None) -> list[tuple[int, int]]:
    """Return the address ranges at which these files are mapped; without, all that are."""
    if not sys.platform.startswith("linux"):
        return []
    found = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and (fields[5][0] == "/" if paths is None else fields[5] in paths):
            low, high = fields[0].split("-")
            found.append((int(low, 16), int(high, 16)))
    return found
