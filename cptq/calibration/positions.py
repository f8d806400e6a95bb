"""Which token rows a sampling pass keeps: the same ones of every layer, drawn once per batch.

Of each batch a quota of its real tokens is drawn at random. What has one row per token is sampled
there; any other input (one row per example, or per routed token) at positions of its own. `few` of
the rows drawn in the whole pass, evenly spread over them, are those that views are taken of
(`cptq.calibration.views`).
"""

from __future__ import annotations

import torch
from torch import Tensor


class Positions:
    """Indices of rows, batch by batch.

    Args:
        seed: of the draw.
        keep: rows drawn in the whole pass.
        few: how many of them are viewed.
    """

    def __init__(self, seed: int, keep: int, few: int) -> None:
        self._draw = torch.Generator().manual_seed(seed)
        few = min(few, keep)
        self._viewed = torch.linspace(0, max(keep - 1, 0), few).round().long()
        self._first = self._quota = 0
        self._rows: dict[int, Tensor] = {}
        self._few: dict[int, Tensor] = {}

    def choose(self, mask_BT: Tensor, quota: int) -> None:
        """Draw `quota` of the next batch's real tokens."""
        self._first, self._quota = self._first + self._quota, quota
        real = mask_BT.flatten().nonzero().flatten().cpu()
        chosen = torch.randperm(len(real), generator=self._draw)[:quota]
        self._rows = {mask_BT.numel(): real[chosen.sort().values]}
        self._few = {}

    def of(self, length: int) -> Tensor:
        """Indices drawn of an input with `length` rows; at least one where it is not per token."""
        if length not in self._rows:
            order = torch.randperm(length, generator=self._draw)
            self._rows[length] = order[: max(1, self._quota)].sort().values
        return self._rows[length]

    def few(self, length: int) -> Tensor:
        """Those of them that are viewed."""
        if length not in self._few:
            rows, viewed = self.of(length), self._viewed - self._first
            self._few[length] = rows[viewed[(viewed >= 0) & (viewed < min(self._quota, len(rows)))]]
        return self._few[length]
