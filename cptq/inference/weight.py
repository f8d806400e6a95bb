"""A packed weight matrix: the tensors of docs/format-packed.md and how to read them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cptq.types import Candidate


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """One weight (out, in), packed; for shapes and bits see `cptq.layouts.packed`.

    `scheme` has the group size that is really used (0: per channel). Operations take it whole; a
    fast one looks at `scheme` and refuses what it does not know (`operations.Backend.supports`).
    """

    scheme: Candidate
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None
    mask: Tensor | None = None
    pattern: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take in memory."""
        parts = (self.codes, self.scale, self.zero, self.mask, self.pattern)
        return sum(part.nbytes for part in parts if part is not None)
