"""Run a text forward through a model and gradients back, with one block at work at a time.

The blocks are a chain: h_0 is what the embedding gives, h_{b+1} = block_b(h_b), z = head(h_B). So a
gradient g_B of some sum over z by h_B can be pulled back block by block,

    g_b = J_b(h_b)^T g_{b+1},      J_b = the derivative of block b by its input

with nothing but h_b at hand: the block runs once more, from h_b, and autograd remembers what
happens inside that one block only. Gradients by its weights come out on the way.

    forward_block(0), forward_block(1), ...      without gradients; h_b of every batch is kept
    turn_around                                  z, then g_B in the place of h_B
    ..., backward_block(1), backward_block(0)    h_b and g_{b+1} are used up, g_b remains

Every batch passes a block before the next block is entered, so that a block's weights are at work
for one stretch forward and one stretch back.

Cost: one forward pass more than a backward pass through the whole model at once takes, and the
model's masks once per block. Memory: the activations inside one block for one batch, and a hidden
state per block and token (`keep`; a single one per token without). Limits: what reaches a block
past its hidden state (position embeddings, masks) has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cptq.calibration.batches import Batch
from cptq.calibration.replay import BlockReplay
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.spill import States
from cptq.errors import ModelError
from cptq.numerics.pairwise import add_where_known
from cptq.types import Unit

#: (batch, model output, its positions) -> the rows z that count, and the gradient by them that is
#: pulled back
Judge = Callable[[int, Any, Tensor | None], tuple[Tensor, Tensor]]
#: batch -> the positions whose outputs are made at once, part by part; None: all
Split = Callable[[int], Iterable[Tensor | None]]


def find_unit_blocks(model: LoadedModel) -> list[list[int]]:
    """Return for each of `model.units` the blocks in which its weights take part, in order.

    One block, unless blocks share a weight.
    """
    owned = [{id(parameter) for parameter in block.parameters()} for block in model.blocks]

    def find(unit: Unit) -> list[int]:
        weights = {id(model.linear(spec.name).weight) for spec in unit.layers}
        return [block for block, ids in enumerate(owned) if ids & weights]

    return [find(unit) for unit in model.units]


class BlockChain:
    """The blocks of a model and a text on its way through them.

    Attributes:
        batch: index of the batch that runs, or ran last.
        blocks: how many blocks there are.
    """

    def __init__(self, model: LoadedModel, batches: Sequence[Batch]) -> None:
        self._replay = BlockReplay(model, list(batches))
        self._spill = model.spill
        self._entered: list[States] = []
        self._now = States(model.spill)
        self.blocks = len(model.blocks)
        self.batch = 0

    def embed(self) -> None:
        """Begin at the first block, also where an earlier way has not been gone to its end."""
        self._entered = []
        self._now = States(
            self._spill, (self._replay.embed(index) for index in self._walk_batches())
        )

    def forward_block(self, block: int, *, keep: bool) -> Iterator[Tensor]:
        """Run the next block on every batch; yield its output of each, as `batch` says.

        Args:
            block: its index.
            keep: keep what enters it, for the way back.
        """
        entered = self._now
        if keep:
            self._entered.append(entered)
            self._now = States(self._spill)
        for index in self._walk_batches():
            hidden = self._replay.run(block, entered[index], index)
            if keep:
                self._now.append(hidden)
            else:
                self._now[index] = hidden
            yield hidden

    def run_again(self, block: int) -> None:
        """Run the block that is being run forward once more on the present batch, for its hooks."""
        self._replay.run(block, self._entered[block][self.batch], self.batch)

    def finish(self, batch: int) -> Any:
        """Return the model's output for a batch that has passed all blocks."""
        return self._replay.finish(self._now[batch], batch)

    def drop(self) -> None:
        """Let go of all hidden states."""
        self._entered, self._now = [], States(self._spill)

    def turn_around(self, judge: Judge, split: Split = lambda _batch: [None]) -> None:
        """Go from the last hidden states to gradients by them, of which each part gives some."""
        for index in self._walk_batches():
            end = self._now[index].detach().requires_grad_()
            total: Tensor | None = None
            for positions in split(index):
                total = add_where_known(total, self._turn_part(end, positions, judge))
            assert total is not None
            self._now[index] = total

    def _turn_part(self, end: Tensor, positions: Tensor | None, judge: Judge) -> Tensor:
        """Return the gradient by the last hidden state of the output at some positions."""
        with torch.enable_grad():
            # a leaf must not be changed in place by what follows: hand on a copy
            output = self._replay.finish(end.clone(), self.batch, positions)
            z_RV, d_RV = judge(self.batch, output, positions)
            (gradient,) = torch.autograd.grad(z_RV, end, d_RV.to(z_RV.dtype))
        return gradient

    def backward_block(self, block: int, weights: Sequence[Tensor] = ()) -> list[Tensor | None]:
        """Pull the gradients of all batches back through a block, the last one not gone through.

        Args:
            block: its index.
            weights: parameters of the block that require gradients.

        Returns:
            The gradient by each of `weights`, summed over batches; None of one without influence.
        """
        entered = self._entered.pop()
        sums: list[Tensor | None] = [None] * len(weights)
        for index in self._walk_batches():
            gradient, *found = self._pull_back(block, entered[index], weights)
            assert gradient is not None
            self._now[index] = gradient
            sums = [add_where_known(total, part) for total, part in zip(sums, found, strict=True)]
        if not self._entered:  # nothing is before the first block
            self._now = States(self._spill)
        return sums

    def _pull_back(
        self, block: int, hidden: Tensor, weights: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradient by what enters a block, and by weights in it, for one batch."""
        start = hidden.detach().requires_grad_()
        with torch.enable_grad():
            arguments = self._replay.take_arguments(block, start.clone(), self.batch)
            output = self._replay.call(block, arguments)
            try:
                return torch.autograd.grad(
                    output, [start, *weights], self._now[self.batch], allow_unused=True
                )
            except (AssertionError, NotImplementedError) as error:  # Reformer's, outside training
                raise ModelError(
                    f"the model's code gives no gradients in evaluation ({error})",
                    allowed="metrics that need none (--metric cca or pruning), or "
                    "--allocator uniform",
                ) from error

    def _walk_batches(self) -> Iterator[int]:
        for index in range(len(self._replay.batches)):
            self.batch = index
            yield index
