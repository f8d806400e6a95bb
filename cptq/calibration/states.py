"""The place where hidden states wait between two blocks.

A text at a block's entrance is a tensor per batch, as much as tokens x width numbers; a model that
is run forward and then backward needs those of every block. What keeps them goes through `States`
alone, so where they lie is decided here: in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


class States:
    """Hidden states or gradients by them, one per batch or block, in order."""

    def __init__(self, states: Iterable[Tensor] = ()) -> None:
        self._kept = list(states)

    def append(self, hidden: Tensor) -> None:
        """Keep one more."""
        self._kept.append(hidden)

    def __getitem__(self, index: int) -> Tensor:
        return self._kept[index]

    def __setitem__(self, index: int, hidden: Tensor) -> None:
        self._kept[index] = hidden

    def __len__(self) -> int:
        return len(self._kept)
