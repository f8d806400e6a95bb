"""A pass over the calibration text that samples the tokens of every linear, block after block.

At randomly chosen token positions, the same for all layers, it keeps the input row x (in,) and the
gradient row g (out,) of sum(d . z) over the output rows by the linear's output y, with z the
model's output and d a random direction of the right covariance (cptq.calibration.objective). From
these, for a weight change dW, dy = dW x and

    KL per output row ~ 1/2 sum_t E (g_t . dy_t)^2 / output rows       (true Fisher, token by token)

Products of different tokens' errors (t != t') are dropped. For metrics that compare representations
it also keeps inputs and outputs of every linear and block at fewer tokens (`LayerActivations`).

Samples of all layers together are as large as the model, so only one block has them at a time
(cptq.calibration.block_chain):

    forward    h_1 = block_0(h_0), h_2 = block_1(h_1), ...     h_b of every batch is kept
    output     z, d, and the gradient of d . z by the last h
    backward   the last block runs again, from its h, and back: samples of its linears -> taken
               by the caller, dropped; then the block before it ...

so that blocks become available from the last to the first. Where no gradients are asked for, one
way forward is enough, and they become available from the first to the last.

Cost: a forward pass; for gradients another one and a backward pass. Memory: of one block, rows x
(inputs + outputs) x 4 bytes on the CPU, capped (`MEMORY_BYTES`), and the second moments of its
inputs, in^2 floats each; a hidden state per token and block (without gradients one per token), and
the few output rows of every block where activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch, count_tokens, split_batches
from cptq.calibration.block_chain import BlockChain, find_unit_blocks
from cptq.calibration.finite import build_not_finite_error
from cptq.calibration.objective import (
    Objective,
    choose_objective,
    mask_real_tokens,
    select_real_rows,
)
from cptq.calibration.recorder import (
    MOMENT_FEATURES,
    LayerActivations,
    LayerSample,
    Recorder,
    SampleRequest,
)
from cptq.calibration.replay import can_leave_out_logits
from cptq.calibration.row_sampler import RowSampler
from cptq.calibration.tokens import Calibration
from cptq.checkpoint.model import LoadedModel
from cptq.errors import CalibrationError
from cptq.numerics.finite import is_finite
from cptq.numerics.hessian import SecondMoment
from cptq.types import Emit, Notice, Progress, Unit

#: token rows kept per layer
ROWS = 1024
#: most tokens that flow through the model in a pass
PASS_TOKENS = 4096
#: logits that are made at once, where a model can leave out the others: they, their gradient and
#: what it is drawn from are the most that a pass has in memory
LOGITS = 1 << 23
#: memory that the kept rows of a block may take
MEMORY_BYTES = 4 << 30


@dataclass(slots=True, kw_only=True, eq=False)
class Samples:
    """What a pass keeps of the units of one block: `layers`, and where requested `activations`.

    A layer that never ran has none. Emptied when the samples of the next block are asked for.
    """

    units: tuple[Unit, ...]
    layers: dict[str, LayerSample]
    activations: dict[str, LayerActivations]


class SamplePass:
    """A pass under way: iterating over it, once, runs it and gives the `Samples` of each block.

    Units come together with the block that they lie in. A weight that several blocks share is done
    with the one that runs last.

    Attributes:
        batches: what flows through the model.
        tokens: how many these are.
        output_rows: how many rows the model's output had; 0 without gradients.
        sampled_rows: most rows that a layer had so far.
        activation_rows: most rows of activations that a layer had so far.
        head_moment: second moment of what the output head was given; None where it is not asked
            for, or the head did not run.
        block_outputs: the output rows (tokens, width) of every block that has run on all batches,
            in order; the tokens of the activations. Empty where none are requested.
    """

    def __init__(
        self,
        model: LoadedModel,
        batches: Sequence[Batch],
        objective: Objective,
        request: SampleRequest,
        *,
        seed: int,
        keep: int,
        emit: Emit,
        head: bool = False,
    ) -> None:
        self.tokens = count_tokens(batches)
        self.output_rows = self.sampled_rows = self.activation_rows = 0
        self.block_outputs: list[Tensor] = []
        self.head_moment: SecondMoment | None = None
        self._head = model.module.get_output_embeddings() if head else None  # type: ignore[operator]
        #: positions whose output is being made, where these are not all
        self._part: Tensor | None = None
        self._model, self._objective, self._request = model, objective, request
        self.batches, self._emit = list(batches), emit
        self._directions = torch.Generator().manual_seed(seed + 1)
        self._masks = [mask_real_tokens(batch) for batch in batches]
        self._chain = BlockChain(model, batches)
        sampler = RowSampler(self._masks, seed, keep, request.activations)
        self._recorder = Recorder(model, request, sampler, self._masks, lambda: self._chain.batch)
        self._where = list(zip(model.units, find_unit_blocks(model), strict=True))

    def __iter__(self) -> Iterator[Samples]:
        self._chain.embed()
        return self._go_back() if self._request.gradients else self._go_forward()

    def finish(self, batch: int) -> Any:
        """Return the model's output for one of `batches` once a way forward has gone to its end."""
        return self._chain.finish(batch)

    def drop_states(self) -> None:
        """Let go of the last hidden states, which `finish` needs."""
        self._chain.drop()

    def run_to_end(self) -> None:
        """Run all of it, for what it measures of the model as a whole."""
        for _samples in self:
            pass

    def _go_forward(self) -> Iterator[Samples]:
        """Record while the blocks run, once, from first to last."""
        for block in range(self._chain.blocks):
            with self._record(block):
                self._run_block(block, keep=False)
            yield from self._hand_over(block, max)

    def _go_back(self) -> Iterator[Samples]:
        """Run all blocks, then record while they run again, from last to first."""
        blocks = range(self._chain.blocks)
        for block in blocks:
            message = f"{self.tokens:,} tokens through block {block + 1}"
            self._emit(Progress(stage="samples", done=block, total=len(blocks), message=message))
            self._run_block(block, keep=True)
        with self._watch_head():
            self._chain.turn_around(self._judge, self._split_output)
        self._emit(Progress(stage="samples", done=len(blocks), total=len(blocks)))
        for block in reversed(blocks):
            with self._record(block):
                self._chain.backward_block(block)
            yield from self._hand_over(block, min)

    def _run_block(self, block: int, *, keep: bool) -> None:
        rows = []
        for hidden in self._chain.forward_block(block, keep=keep):
            if not is_finite(hidden):
                self._refuse_output(block)
            if self._request.activations:
                rows.append(self._recorder.select_few(hidden))
        if rows:
            self.block_outputs.append(torch.cat(rows))

    def _refuse_output(self, block: int) -> None:
        """Raise CalibrationError: the block gives NaN or infinity on the present batch."""
        if self._request.gradients:
            with self._record(block):  # which names the layer
                self._chain.run_again(block)
        raise build_not_finite_error(f"the output of {self._model.block_names[block]}")

    def _record(self, block: int) -> AbstractContextManager[None]:
        return self._recorder.record(block, [u for u, blocks in self._where if block in blocks])

    @contextmanager
    def _watch_head(self) -> Iterator[None]:
        """Sum the second moment of what the output head is given."""
        if self._head is None:
            yield
            return

        def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            mask_BT = self._masks[self._chain.batch]
            if self._part is not None and args[0].shape[1] == len(self._part):
                mask_BT = mask_BT[:, self._part]
            elif self._part is not None and int(self._part[0]):
                return  # a head that runs on all positions whatever is asked for: counted once
            rows_MI = select_real_rows(args[0].detach(), mask_BT)
            self.head_moment = self.head_moment or SecondMoment(rows_MI.shape[1], rows_MI.device)
            self.head_moment.add(rows_MI)

        handle = self._head.register_forward_pre_hook(add)
        try:
            yield
        finally:
            handle.remove()

    def _split_output(self, batch: int) -> Iterator[Tensor | None]:
        """Yield the positions whose logits are made at once, in the order of the output's rows."""
        for positions in self._list_parts(batch):
            self._part = positions
            yield positions

    def _list_parts(self, batch: int) -> Sequence[Tensor | None]:
        ids_BT, kind = self.batches[batch]["input_ids"], self._model.kind
        if kind != "causal-lm" or len(ids_BT) > 1 or not can_leave_out_logits(self._model):
            return [None]
        width = int(self._model.config.get_text_config().vocab_size)
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        parts: Sequence[Tensor] = positions_T.split(max(1, LOGITS // width))
        return parts

    def _judge(self, batch: int, output: Any, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        z_RV = self._objective.select_rows(output, self.batches[batch], positions)
        if not is_finite(z_RV):
            raise build_not_finite_error("the model's output")
        self.output_rows += z_RV.shape[0]
        return z_RV, self._objective.draw_direction(z_RV, self._directions)

    def _hand_over(self, block: int, last_of: Callable[[list[int]], int]) -> Iterator[Samples]:
        """Yield the samples of the units that no later block of the way has a part in."""
        units = tuple(unit for unit, blocks in self._where if last_of(blocks) == block)
        layers, activations = self._recorder.take(units, self.output_rows)
        self.sampled_rows = max(self.sampled_rows, *(len(s.x_TI) for s in layers.values()), 0)
        rows = [len(few.x_TI) for few in activations.values()]
        self.activation_rows = max(self.activation_rows, *rows, 0)
        samples = Samples(units=units, layers=layers, activations=activations)
        del layers, activations
        yield samples
        # a caller's loop still holds the samples while the next block runs: take its rows away
        samples.layers.clear()
        samples.activations.clear()


def sample_blocks(
    model: LoadedModel,
    rows: Sequence[Batch],
    objective: Objective,
    request: SampleRequest,
    *,
    seed: int,
    emit: Emit,
    keep: int = ROWS,
    least: int = 0,
    tokens: int = PASS_TOKENS,
    memory_bytes: int = MEMORY_BYTES,
    head: bool = False,
) -> SamplePass:
    """Prepare a pass; it runs while the caller iterates over it.

    Args:
        model: the dense model; left unchanged.
        rows: calibration batches; the first ones are used until `tokens` are reached.
        objective: how the model is judged.
        request: what to keep.
        seed: seed of the positions and of the directions.
        emit: takes progress, and a notice when memory allows fewer rows than `keep`.
        keep: rows to keep per layer.
        least: rows that are kept whatever the memory.
        tokens: most tokens that flow through the model.
        memory_bytes: about how much the kept rows may take.
        head: sum the second moment of what the output head is given, if it runs.

    Raises:
        CalibrationError: no tokens; while it runs, an activation or a gradient is NaN or infinite.
    """
    batches = split_batches(take_batches(rows, tokens))
    total = count_tokens(batches)
    if total == 0:
        raise CalibrationError("the calibration data holds no tokens")
    keep = min(_limit_rows(model, request, keep, least, memory_bytes, emit), total)
    return SamplePass(
        model, batches, objective, request, seed=seed, keep=keep, emit=emit, head=head
    )


def sample_moments(
    model: LoadedModel,
    calibration: Calibration,
    *,
    seed: int,
    emit: Emit,
    features: int = MOMENT_FEATURES,
) -> SamplePass:
    """Prepare a pass over all of the text that keeps the second moment of every layer's inputs.

    Args:
        model, calibration, seed, emit: as `sample_blocks`.
        features: how many inputs a layer may have for that.

    Raises:
        CalibrationError: as `sample_blocks`.
    """
    return sample_blocks(
        model,
        calibration.batches,
        choose_objective(model.kind, model.config),
        SampleRequest(moments=True, features=features),
        seed=seed,
        emit=emit,
        keep=1,
        tokens=calibration.tokens,
    )


def take_batches(rows: Sequence[Batch], tokens: int) -> list[Batch]:
    """Return the first batches that hold `tokens` together, or all there are."""
    chosen: list[Batch] = []
    done = 0
    for batch in rows:
        if done >= tokens:
            break
        chosen.append(batch)
        done += count_tokens([batch])
    return chosen


def _limit_rows(
    model: LoadedModel, request: SampleRequest, keep: int, least: int, memory_bytes: int, emit: Emit
) -> int:
    """Return the rows that fit into memory.

    Every fused unit of a block keeps its input once and the gradients of each of its outputs.
    """
    if not request.gradients:
        return keep
    floats: dict[int | None, int] = {}
    for unit in model.units:
        outputs = sum(layer.shape[0] for layer in unit.layers)
        floats[unit.block] = floats.get(unit.block, 0) + unit.layers[0].shape[1] + outputs
    fits = max(memory_bytes // (4 * max(floats.values())), 1)
    if fits >= keep:
        return keep
    emit(
        Notice(
            kind="info",
            subject="sensitivity samples",
            message=f"{max(fits, least)} token rows per layer instead of {keep}, to stay near"
            f" {memory_bytes / 2**30:.1f} GiB",
        )
    )
    return max(fits, least)
