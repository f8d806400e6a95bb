"""Where the error of changed weights accumulates: the hidden state after every block.

With h the dense model's hidden state after a block and h' that of the model as it is now, on the
same text and with the error of all earlier blocks in it,

    error = sum |h' - h|^2 / sum |h|^2          over all positions and the width; 0 where equal

Numbers before block 0 are those of the embedding, which a plan may have packed. A value may fall
with depth: the residual stream grows, and later blocks correct earlier errors.

Cost: two forward passes over `TOKENS` tokens; memory: one hidden state per block and token, in
the model's type. Padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cptq.calibration.batches import Batch
from cptq.calibration.objective import mask_real_tokens, select_real_rows
from cptq.calibration.replay import BlockReplay
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.spill import States

#: tokens of the text that runs through
TOKENS = 512


def take_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Return the first rows that have `TOKENS` positions together, at least one, as one batch."""
    if not batches:
        return []
    first = batches[0]
    rows = max(1, TOKENS // first["input_ids"].shape[1])
    return [{name: value[:rows] for name, value in first.items()}]


class DepthError:
    """The hidden states of the dense model on a few rows; make it while the model is dense."""

    def __init__(self, model: LoadedModel, rows: Sequence[Batch]) -> None:
        self._model = model
        self._rows = take_rows(rows)
        self._replay = BlockReplay(model, self._rows)
        walks = map(self._replay.walk, range(len(self._rows)))
        self._dense = [States(model.spill, walk) for walk in walks]

    @torch.no_grad()
    def measure(self) -> tuple[float, ...]:
        """Return the error before block 0 and after every block of the model as it is now."""
        count = len(self._model.block_names) + 1
        gap, norm = [0.0] * count, [0.0] * count
        for index, row in enumerate(self._rows):
            mask_BT = mask_real_tokens(row)
            pairs = zip(self._dense[index], self._replay.walk(index), strict=True)
            for place, (dense_BTD, own_BTD) in enumerate(pairs):
                dense_ND, own_ND = (
                    select_real_rows(x, mask_BT).double() for x in (dense_BTD, own_BTD)
                )
                gap[place] += float((own_ND - dense_ND).square().sum())
                norm[place] += float(dense_ND.square().sum())
        return tuple(a / b if b else 0.0 for a, b in zip(gap, norm, strict=True))
