"""The truth about one unit: the divergence that replacing its weights causes, by replay.

The held-out rows run through the dense model once; the input of every block is kept. To try other
weights for a unit of block b only the blocks from b on run again, then the head:

    KL(unit, W') = mean over rows of the answer of KL(dense || model with W' in that one unit)

Units outside the blocks (a pooler, a head) take a whole forward pass.

Cost: on average half a forward pass of the held-out rows per trial; memory: one hidden state per
block. Limits: one unit at a time, so interactions between units are not seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from cptq.calibration.objective import Objective
from cptq.calibration.replay import BlockReplay, forward
from cptq.calibration.slices import Rows, token_count
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import replaced
from cptq.errors import CalibrationError
from cptq.types import Unit


class Probe:
    """Divergence of single changes on held-out rows.

    Args:
        model: the dense model; every trial leaves it as it was, to the bit.
        rows: held-out batches.
        objective: how the model is judged.

    Attributes:
        tokens: held-out tokens; seconds: what setting up took; trials: how many were run.
    """

    @torch.no_grad()
    def __init__(self, model: LoadedModel, rows: Sequence[Rows], objective: Objective) -> None:
        started = time.perf_counter()
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
        self.tokens = token_count(self._rows)
        self.trials = 0
        self.seconds = time.perf_counter() - started

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
        self.trials += 1
        with self._changed(weights):
            rows = torch.cat([self._rows_of(unit, index) for index in range(len(self._rows))])
        mean = float(rows.mean())
        if mean != mean:
            raise CalibrationError(
                f"the model's output holds NaN with {unit.name} compressed",
                hint="run in --dtype float32",
            )
        return mean

    @torch.no_grad()
    def whole(self) -> Tensor:
        """Divergence of each row of the answer (rows,) of the model as it stands now, float64.

        For models of which many units have changed: one forward pass of the held-out rows.

        Raises:
            CalibrationError: an answer is NaN or infinite.
        """
        self.trials += 1
        parts = []
        for reference_RV, row in zip(self._reference, self._rows, strict=True):
            answer_RV = self._objective.answer(forward(self._model, row), row)
            parts.append(self._objective.divergence(reference_RV, answer_RV))
        rows = torch.cat(parts).cpu()
        if not bool(torch.isfinite(rows).all()):
            raise CalibrationError(
                "the compressed model's output holds NaN or infinity",
                hint="run in --dtype float32",
            )
        return rows

    def _rows_of(self, unit: Unit, index: int) -> Tensor:
        answer_RV = self._objective.answer(self._output(unit, index), self._rows[index])
        return self._objective.divergence(self._reference[index], answer_RV)

    def _output(self, unit: Unit, index: int) -> object:
        if unit.block is None:
            return forward(self._model, self._rows[index])
        return self._replay.run_from(unit.block, self._inputs[index][unit.block], index)

    @contextmanager
    def _changed(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, W_OI in weights.items():
                stack.enter_context(replaced(self._model.linear(name), W_OI))
            yield
