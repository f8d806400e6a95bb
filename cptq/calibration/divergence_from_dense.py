"""Measure the divergence of a changed model from the dense one on held-out rows, by replay.

The held-out rows run through the dense model once, and the input of every block is kept. To try
other weights for a unit of block b only the blocks from b on run again, then the head, of language
models at every `JUDGED_EVERY`-th position: neighbouring positions say nearly the same, and the head
is a third of a trial (smollm2-135m):

    KL(unit, W') = mean over output rows of KL(dense || model with W' in that one unit)

Units outside the blocks (a pooler, a head) take a whole forward pass, and so do changes of many
units at once. A trial may also add noise to a unit's inputs instead of changing its weights.

Cost: on average half a forward pass of the held-out rows per trial; memory: the log-probabilities
of the judged positions, and one hidden state per block. Limits: with one unit at a time
interactions between units are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.batches import Batch, count_tokens
from cptq.calibration.objective import Objective, mask_real_tokens
from cptq.calibration.replay import BlockReplay, forward
from cptq.calibration.samples import take_batches
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.spill import States
from cptq.checkpoint.weights import replace_weight
from cptq.errors import CalibrationError
from cptq.numerics.standard_error import compute_standard_error
from cptq.types import Emit, Progress, Unit

#: of the positions of a language model's window, one in so many is judged
JUDGED_EVERY = 2


class DivergenceFromDense:
    """Divergence from the dense model on held-out rows.

    Args:
        model: the dense model; every trial leaves it as it was, to the bit.
        rows: held-out batches.
        objective: how the model is judged.
        units: keep the inputs of all blocks, so that single units can be tried.
        emit: takes progress of the dense pass.

    Attributes:
        objective: how the model is judged.
        tokens: held-out tokens; trials: how many were run.
        unit: what a divergence is measured in.
        window_R: the window (language models) or sample that each output row belongs to, (rows,).
        samples, sample_name: how many of these there are, and what one is called.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Batch],
        objective: Objective,
        emit: Emit = lambda event: None,
        *,
        units: bool = True,
    ) -> None:
        self._model = model
        self._rows = list(rows)
        self.objective = objective
        self._positions = [_choose_positions(row, objective) for row in self._rows]
        self._replay = BlockReplay(model, self._rows, self._positions)
        #: what enters each block, batch by batch
        self._inputs: list[States] = []
        self._reference = States(model.spill)
        for index in range(len(self._rows)):
            z_RV = self._select(self._record(index) if units else self._run(None, index), index)
            self._reference.append(objective.compute_reference(z_RV))
            emit(Progress(stage="held-out text", done=index + 1, total=len(self._rows)))
        self.unit = objective.unit
        self.sample_name = "window" if objective.row == "token" else objective.row
        self.trials = 0
        self.window_R = self._number_windows()
        self._count()

    def _count(self) -> None:
        self.samples = int(self.window_R[-1]) + 1
        self.tokens = count_tokens(self._rows)

    def take_part(self, tokens: int) -> DivergenceFromDense:
        """Return the same on the first batches that hold `tokens` together; it shares memory."""
        part = copy(self)
        part._rows = take_batches(self._rows, tokens)
        windows = sum(len(row["input_ids"]) for row in part._rows)
        part.window_R = self.window_R[self.window_R < windows]
        part._count()
        return part

    def _record(self, index: int) -> object:
        """Return the dense model's output, and keep the input of every block."""
        inputs = list(self._replay.walk(index))
        self._inputs.append(States(self._model.spill, inputs[:-1]))
        return self._replay.finish(inputs[-1], index)

    def _number_windows(self) -> Tensor:
        """Return the window of each output row, counted through all batches."""
        found, done = [], 0
        for index, row in enumerate(self._rows):
            positions, reference_RV = self._positions[index], self._reference[index]
            samples = len(row["input_ids"])
            counts = torch.ones(samples, dtype=torch.long)
            if positions is not None:
                counts = mask_real_tokens(row)[:, positions].sum(1).cpu()
            found.append(done + torch.arange(samples).repeat_interleave(counts))
            assert len(found[-1]) == len(reference_RV)
            done += samples
        return torch.cat(found)

    @torch.no_grad()
    def measure_unit(self, unit: Unit, weights: Mapping[str, Tensor]) -> float:
        """Return the mean divergence per output row with other weights in one unit.

        Args:
            unit: the unit that changes.
            weights: layer name -> W_OI, for the layers of the unit that change.

        Raises:
            CalibrationError: the changed model's output is NaN or infinite.
        """
        with self._replace(weights):
            return self._measure_mean(unit.block, f"{unit.name} compressed")

    @torch.no_grad()
    def measure_input_noise(self, unit: Unit, noise: float, seed: int) -> float:
        """Return the mean divergence per output row when the unit reads x + noise |x| eps.

        Args:
            unit: the unit whose linears read noisy inputs; those that read one tensor read the
                same noise.
            noise: standard deviation of the noise as a share of each input.
            seed: seed of eps, standard normal, one draw per held-out token.

        Raises:
            CalibrationError: the changed model's output is NaN or infinite.
        """
        hook = _InputNoise(noise, seed)
        with ExitStack() as stack:
            for layer in unit.layers:
                handle = self._model.linear(layer.name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            return self._measure_mean(unit.block, f"noise on the inputs of {unit.name}")

    @torch.no_grad()
    def measure_layers(
        self, weights: Mapping[str, Tensor | Callable[[], Tensor]], block: int | None = None
    ) -> float:
        """Return the mean divergence per output row with other weights in any layers.

        Args:
            weights: layer name -> W_OI, or what makes it whenever it is needed.
            block: where given, the first that changes: what comes before it is not run again.

        Raises:
            CalibrationError: the changed model's output is NaN or infinite.
        """
        with self._replace(weights):
            return self._measure_mean(block, f"{len(weights)} layers changed")

    def _measure_mean(self, block: int | None, change: str) -> float:
        self.trials += 1
        mean = float(torch.cat(self._measure_batches(block)).mean())
        if mean != mean:
            raise CalibrationError(
                f"the model's output holds NaN with {change}", hint="run in --dtype float32"
            )
        return mean

    @torch.no_grad()
    def measure_rows(self) -> Tensor:
        """Return the divergence of each output row (rows,) of the model as it is now, float64.

        For models of which many units have changed: one forward pass of the held-out rows.

        Raises:
            CalibrationError: an output is NaN or infinite.
        """
        self.trials += 1
        divergence_R = torch.cat(self._measure_batches(None)).cpu()
        if not bool(torch.isfinite(divergence_R).all()):
            raise CalibrationError(
                "the compressed model's output holds NaN or infinity",
                hint="run in --dtype float32",
            )
        return divergence_R

    @torch.no_grad()
    def iterate_rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield, batch by batch, what the dense model and the model as it is now make of its rows.

        Yields:
            What a divergence is measured from (rows, width), the output now (rows, width), and of
            causal language models the next token of each row (rows,), -1 where there is none.
        """
        for index, output in enumerate(self._run_all(None)):
            label_R = self._label(self._rows[index], index)
            yield self._reference[index], self._select(output, index), label_R

    def _label(self, row: Batch, index: int) -> Tensor | None:
        positions = self._positions[index]
        if self.objective.kind != "causal-lm" or positions is None:
            return None
        mask_BT = mask_real_tokens(row)
        next_BT = torch.full_like(row["input_ids"], -1)
        next_BT[:, :-1] = row["input_ids"][:, 1:].masked_fill(~mask_BT[:, 1:], -1)
        return next_BT[:, positions][mask_BT[:, positions]]

    def describe_difference(self, gap_R: Tensor) -> str:
        """Return the mean of a difference (rows,) between two `measure_rows`, with its standard
        error and its sample, in words."""
        error = compute_standard_error(gap_R, self.window_R)
        return (
            f"difference {float(gap_R.mean()):+.3g} ± {error:.2g}, {self.tokens:,} tokens, "
            f"{self.samples:,} {self.sample_name}s"
        )

    def _measure_batches(self, block: int | None) -> list[Tensor]:
        """Return the divergences of each batch, run again from the first block that may differ."""
        return self._measure_parts(self._run_all(block))

    def _measure_parts(self, outputs: Iterator[object]) -> list[Tensor]:
        return [
            self.objective.compute_divergence(self._reference[index], self._select(output, index))
            for index, output in enumerate(outputs)
        ]

    def _run_all(self, block: int | None) -> Iterator[object]:
        """Yield the output of each batch, run again from the first block that may differ."""
        if self._model.held_whole:
            return (self._run(block, index) for index in range(len(self._rows)))
        return self._run_together(block)

    def _run_together(self, block: int | None) -> Iterator[object]:
        """Yield the output of each batch; all go through a block while it is in memory."""
        spill, replay = self._model.spill, self._replay
        if block is None:
            hidden = States(spill, (replay.embed(index) for index in range(len(self._rows))))
        else:
            hidden = States(spill, (inputs[block] for inputs in self._inputs[: len(self._rows)]))
        for place in range(block or 0, len(self._model.blocks)):
            for index, state in enumerate(hidden):
                hidden[index] = replay.run(place, state, index)
        for index, state in enumerate(hidden):
            yield replay.finish(state, index)

    def _select(self, output: object, index: int) -> Tensor:
        return self.objective.select_rows(output, self._rows[index], self._positions[index])

    def _run(self, block: int | None, index: int) -> object:
        """Return the model's output, computed again from the first block that may have changed."""
        if block is None:
            return forward(self._model, self._rows[index], self._positions[index])
        return self._replay.run_from(block, self._inputs[index][block], index)

    @contextmanager
    def _replace(self, weights: Mapping[str, Tensor | Callable[[], Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, W_OI in weights.items():
                stack.enter_context(replace_weight(self._model.linear(name), W_OI))
            yield

    @torch.no_grad()
    def measure_block_noise(self, block: int, noise: float, seed: int) -> float:
        """Return the mean divergence per output row when a block reads h + noise |h| eps.

        h is the hidden state that enters the block, the residual stream included.

        Args:
            block: index of the block.
            noise: standard deviation of the noise as a share of each number of h.
            seed: seed of eps, standard normal, one draw per held-out token. Blocks of equal seed
                read the same eps, so that their divergences differ by the block alone.

        Raises:
            CalibrationError: the changed model's output is NaN or infinite.
        """
        with self._disturb(block, noise, seed):
            return self._measure_mean(block, f"noise on the input of block {block}")

    @contextmanager
    def _disturb(self, block: int, noise: float, seed: int) -> Iterator[None]:
        """Put noisy hidden states in the place of a block's cached inputs."""
        add_noise = _InputNoise(noise, seed)
        dense = [inputs[block] for inputs in self._inputs]
        try:
            for inputs, hidden in zip(self._inputs, dense, strict=True):
                inputs[block] = add_noise(self._model.blocks[block], (hidden,))[0]
            yield
        finally:
            for inputs, hidden in zip(self._inputs, dense, strict=True):
                inputs[block] = hidden


def _choose_positions(row: Batch, objective: Objective) -> Tensor | None:
    """Return the positions at which a language model is judged; None for other models.

    The last of every `JUDGED_EVERY`, or all of a window that is no longer than a few of these.
    """
    if objective.kind not in ("causal-lm", "masked-lm"):
        return None
    length = row["input_ids"].shape[1]
    every = JUDGED_EVERY if length >= 8 * JUDGED_EVERY else 1
    return torch.arange(every - 1, length, every, device=row["input_ids"].device)


class _InputNoise:
    """A forward pre-hook: x + noise |x| eps, the same for all linears that read one tensor."""

    def __init__(self, noise: float, seed: int) -> None:
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, noisy = self._last
        if x is not args[0] or noisy is None:
            x = args[0]
            eps = torch.randn(x.shape, generator=self._generator).to(x.device, x.dtype)
            noisy = torch.addcmul(x, x.abs(), eps, value=self._noise)
            self._last = (x, noisy)
        return (noisy, *args[1:])
