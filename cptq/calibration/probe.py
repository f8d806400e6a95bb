"""The truth about one unit: the divergence that replacing its weights causes, by replay.

The held-out rows run through the dense model once; the input of every block is kept. To try other
weights for a unit of block b only the blocks from b on run again, then the head:

    KL(unit, W') = mean over rows of the answer of KL(dense || model with W' in that one unit)

Units outside the blocks (a pooler, a head) take a whole forward pass.

Beside weights, a trial may disturb what a unit reads (`disturbed`), and may change many units at
once (`whole`, `rows_now`), which takes a whole forward pass.

Cost: on average half a forward pass of the held-out rows per trial; memory: one hidden state per
block. Limits: with one unit at a time interactions between units are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.objective import Objective
from cptq.calibration.replay import BlockReplay, forward
from cptq.calibration.slices import Rows, token_count
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import replaced
from cptq.errors import CalibrationError
from cptq.types import Emit, Progress, Unit


class Probe:
    """Divergence of single changes on held-out rows.

    Args:
        model: the dense model; every trial leaves it as it was, to the bit.
        rows: held-out batches.
        objective: how the model is judged.
        emit: takes progress of the dense pass.

    Attributes:
        tokens: held-out tokens; trials: how many were run.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LoadedModel,
        rows: Sequence[Rows],
        objective: Objective,
        emit: Emit = lambda event: None,
    ) -> None:
        self._model = model
        self._rows = list(rows)
        self._objective = objective
        self._replay = BlockReplay(model, self._rows)
        self._inputs: list[list[Tensor]] = []
        self._reference: list[Tensor] = []
        for index, row in enumerate(self._rows):
            inputs = list(self._dense_inputs(index))
            self._inputs.append(inputs[:-1])
            answer_RV = objective.answer(self._replay.finish(inputs[-1], index), row)
            self._reference.append(objective.reference(answer_RV))
            emit(Progress(stage="held-out text", done=index + 1, total=len(self._rows)))
        self.tokens = token_count(self._rows)
        self.trials = 0

    def _dense_inputs(self, index: int) -> Iterator[Tensor]:
        """The input of every block, then the output of the last."""
        hidden = self._replay.embed(index)
        for block in range(len(self._model.block_names)):
            yield hidden
            hidden = self._replay.run(block, hidden, index)
        yield hidden

    @torch.no_grad()
    def divergence(self, unit: Unit, weights: Mapping[str, Tensor]) -> float:
        """Mean divergence per row of the answer with other weights in one unit.

        Args:
            unit: where.
            weights: layer name -> W_OI, for the layers of the unit that change.

        Raises:
            CalibrationError: the changed model's answer is NaN or infinite.
        """
        with self._changed(weights):
            return self._mean(unit.block, f"{unit.name} compressed")

    @torch.no_grad()
    def disturbed(self, unit: Unit, noise: float, seed: int) -> float:
        """Mean divergence per row of the answer when the unit reads x + noise |x| eps.

        Args:
            unit: whose linears are disturbed; those that read one tensor read one disturbance.
            noise: standard deviation of the disturbance as a share of each input.
            seed: of eps, standard normal, one draw per held-out token.

        Raises:
            CalibrationError: the disturbed model's answer is NaN or infinite.
        """
        hook = _Disturbance(noise, seed)
        with ExitStack() as stack:
            for layer in unit.layers:
                handle = self._model.linear(layer.name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            return self._mean(unit.block, f"the inputs of {unit.name} disturbed")

    @torch.no_grad()
    def whole(self, weights: Mapping[str, Tensor]) -> float:
        """Mean divergence per row of the answer with other weights anywhere: layer name -> W_OI.

        Raises:
            CalibrationError: the changed model's answer is NaN or infinite.
        """
        with self._changed(weights):
            return self._mean(None, f"{len(weights)} layers changed")

    def _mean(self, block: int | None, change: str) -> float:
        self.trials += 1
        rows = torch.cat([self._rows_of(block, index) for index in range(len(self._rows))])
        mean = float(rows.mean())
        if mean != mean:
            raise CalibrationError(
                f"the model's output holds NaN with {change}", hint="run in --dtype float32"
            )
        return mean

    @torch.no_grad()
    def rows_now(self) -> Tensor:
        """Divergence of each row of the answer (rows,) of the model as it stands now, float64.

        For models of which many units have changed for good: one forward pass of the held-out rows.

        Raises:
            CalibrationError: an answer is NaN or infinite.
        """
        self.trials += 1
        rows = torch.cat([self._rows_of(None, index) for index in range(len(self._rows))]).cpu()
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                "the compressed model's output holds NaN or infinity",
                hint="run in --dtype float32",
            )
        return rows

    def _rows_of(self, block: int | None, index: int) -> Tensor:
        answer_RV = self._objective.answer(self._output(block, index), self._rows[index])
        return self._objective.divergence(self._reference[index], answer_RV)

    def _output(self, block: int | None, index: int) -> object:
        """The model's output, run again from the first block that may have changed."""
        if block is None:
            return forward(self._model, self._rows[index])
        return self._replay.run_from(block, self._inputs[index][block], index)

    @contextmanager
    def _changed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, W_OI in weights.items():
                stack.enter_context(replaced(self._model.linear(name), W_OI))
            yield


class _Disturbance:
    """A forward pre-hook: x + noise |x| eps, the same for all linears that read one tensor."""

    def __init__(self, noise: float, seed: int) -> None:
        self._noise = noise
        self._generator = torch.Generator().manual_seed(seed)
        self._last: tuple[Tensor | None, Tensor | None] = (None, None)

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, disturbed = self._last
        if x is not args[0] or disturbed is None:
            x = args[0]
            eps = torch.randn(x.shape, generator=self._generator).to(x.device, x.dtype)
            disturbed = torch.addcmul(x, x.abs(), eps, value=self._noise)
            self._last = (x, disturbed)
        return (disturbed, *args[1:])
