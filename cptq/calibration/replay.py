"""Run part of a model on batches: one block alone, or everything after a given hidden state.

How a family calls its blocks is not known here (`cptq.checkpoint.chain`): masks, rotary tables and
extra arguments are the model's own. The overhead beyond the needed blocks is the embedding lookup
and the masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.checkpoint.chain import Arguments, Chain, list_token_embeddings
from cptq.checkpoint.model import LoadedModel


class BlockReplay:
    """Replays blocks of `model` on `batches`; creating one runs block 0 on the first batch,
    if there is one.

    `positions`: of every batch, those at which logits are wanted, where the model can leave out the
    others; all of them without.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: list[Batch],
        positions: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self._positions = positions or [None] * len(batches)
        embeddings = list_token_embeddings(model.module)
        self._chain = Chain(model.blocks, embeddings, self._make_run(0)) if batches else None

    @property
    def _blocks(self) -> Chain:
        assert self._chain is not None, "there is no batch to run"
        return self._chain

    @torch.no_grad()
    def embed(self, batch_index: int) -> Tensor:
        """Return the input of block 0, (rows, tokens, width)."""
        return self._blocks.embed(self._make_run(batch_index))

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, batch_index: int) -> Tensor:
        """Run one block alone; return its output hidden state."""
        return self._blocks.run_block(block, hidden, self._make_run(batch_index))

    def walk(self, batch_index: int) -> Iterator[Tensor]:
        """Yield the input of every block, then the output of the last."""
        hidden = self.embed(batch_index)
        yield hidden
        for block in range(len(self.model.block_names)):
            hidden = self.run(block, hidden, batch_index)
            yield hidden

    @torch.no_grad()
    def take_arguments(self, block: int, hidden: Tensor, batch_index: int) -> Arguments:
        """Return what the model calls a block with, its hidden state replaced by `hidden`.

        For a caller that runs the block itself, outside of the model's forward.
        """
        return self._blocks.take_arguments(block, hidden, self._make_run(batch_index))

    def call(self, block: int, arguments: Arguments) -> Tensor:
        """Run a block on arguments that were taken; return its output hidden state."""
        return self._blocks.call(block, arguments)

    def run_from(
        self, block: int, hidden: Tensor, batch_index: int, positions: Tensor | None = None
    ) -> Any:
        """Return the model's output, given the input of `block`; `positions` as in `forward`.

        With `block` equal to the number of blocks only what follows the last one runs. Gradients
        flow unless the caller has disabled them.
        """
        return self._blocks.run_from(block, hidden, self._make_run(batch_index, positions))

    def finish(self, hidden: Tensor, batch_index: int, positions: Tensor | None = None) -> Any:
        """Return the model's output, given the last block's output."""
        return self.run_from(len(self.model.blocks), hidden, batch_index, positions)

    def _make_run(self, batch_index: int, positions: Tensor | None = None) -> Callable[[], Any]:
        if positions is None:
            positions = self._positions[batch_index]
        return partial(forward, self.model, self.batches[batch_index], positions)


def forward(model: LoadedModel, batch: Batch, positions: Tensor | None = None) -> Any:
    """Return the model's output for a batch, without a key-value cache.

    `positions`: those at which logits are wanted; a model that cannot leave out the others gives
    all of them.
    """
    extra: dict[str, Any] = {"use_cache": False} if model.kind == "causal-lm" else {}
    if positions is not None and can_leave_out_logits(model):
        extra["logits_to_keep"] = positions
    return model.module(**batch, **extra)


def can_leave_out_logits(model: LoadedModel) -> bool:
    """Return whether a model gives the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.module.forward).parameters
