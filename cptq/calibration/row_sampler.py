"""Choose the token rows that a sampling pass keeps, the same ones in every layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: spreads (seed, batch, length) over the seeds of a generator
PRIME = 1_000_003


class RowSampler:
    """Draws rows of every batch, in proportion to its tokens.

    The rows of the whole pass are numbered 0 .. keep - 1 in the order of batches. `few` of these
    numbers, evenly spaced, are the rows whose activations are kept as well.

    An input that has no row per token (one per example, or per token routed to an expert) gets
    positions of its own, at least one per batch. They depend on the seed, the batch and the number
    of rows alone, not on what was asked before: blocks may run in any order.

    Args:
        masks: (batch, positions) of each batch, True where a token is not padding.
        seed: seed of the draw.
        keep: rows drawn in the whole pass, at most the number of tokens.
        few: how many of them have their activations kept.
    """

    def __init__(self, masks: Sequence[Tensor], seed: int, keep: int, few: int) -> None:
        self._seed = seed
        few = min(few, keep)
        self._few_numbers = torch.linspace(0, max(keep - 1, 0), few).round().long()
        #: number of each batch's first row, and how many rows it has
        self._first: list[int] = []
        self._quotas: list[int] = []
        #: by batch and number of rows of an input
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._draw_tokens(masks, keep)

    def _draw_tokens(self, masks: Sequence[Tensor], keep: int) -> None:
        """Draw real tokens of every batch."""
        generator = torch.Generator().manual_seed(self._seed)
        total, done = sum(int(mask.sum()) for mask in masks), 0
        for batch, mask_BT in enumerate(masks):
            real = mask_BT.flatten().nonzero().flatten().cpu()
            # differences of rounded running totals: the quotas add up to exactly `keep`
            first = done * keep // total
            done += len(real)
            quota = done * keep // total - first
            self._first.append(first)
            self._quotas.append(quota)
            chosen = torch.randperm(len(real), generator=generator)[:quota]
            self._rows[batch, mask_BT.numel()] = real[chosen.sort().values]

    def get_rows(self, batch: int, length: int) -> Tensor:
        """Return the row indices to keep of an input of a batch that has `length` rows."""
        if (batch, length) not in self._rows:
            seed = ((self._seed * PRIME + batch) * PRIME + length) % (1 << 63)
            order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
            self._rows[batch, length] = order[: max(1, self._quotas[batch])].sort().values
        return self._rows[batch, length]

    def get_few(self, batch: int, length: int) -> Tensor:
        """Return those of the row indices whose activations are kept."""
        rows = self.get_rows(batch, length)
        local = self._few_numbers - self._first[batch]  # numbers within this batch
        local = local[(local >= 0) & (local < self._quotas[batch])]
        if len(rows) < self._quotas[batch]:  # of a shorter input, rows from all over it
            local = torch.linspace(0, len(rows) - 1, min(len(local), len(rows))).round().long()
        return rows[local]
