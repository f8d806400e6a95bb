"""Keep rows that flow through the linears of a block while it runs: the hooks of a sampling pass.

An input that several linears read (q/k/v) is recognised by identity and kept once. A linear that is
called more than once in a forward pass keeps rows of every call; gradients, which arrive in the
reverse order, go to their call. Second moments E x x^T are summed over ALL tokens where they fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.finite import build_not_finite_error
from cptq.calibration.objective import flatten_rows
from cptq.calibration.row_sampler import RowSampler
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.finite import is_finite
from cptq.numerics.hessian import SecondMoment
from cptq.types import LayerSpec, Unit

#: largest layer input whose full second moment is summed in the pass
MOMENT_FEATURES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """What a pass keeps: gradients with the input rows they belong to, second moments, activations.

    `activations` is the number of tokens at which inputs and outputs are kept; `features`, how many
    inputs a layer may have for a second moment.
    """

    gradients: bool = False
    moments: bool = False
    activations: int = 0
    features: int = MOMENT_FEATURES

    def __or__(self, other: SampleRequest) -> SampleRequest:
        """Return the request that covers both."""
        return SampleRequest(
            **{f: max(getattr(self, f), getattr(other, f)) for f in self.__dataclass_fields__}
        )


@dataclass(slots=True, kw_only=True, eq=False)
class LayerSample:
    """Sampled rows of one linear, float32 on the CPU.

    x_TI: input rows, none without gradients; g_TO: gradient rows, None where not requested.
    Layers that read the same input share `x_TI` and `moment`. `scale` turns a sum over the rows
    into nats per output row: tokens seen / (rows kept * output rows).
    """

    x_TI: Tensor
    g_TO: Tensor | None
    moment: SecondMoment | None
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerActivations:
    """The same tokens before and after one linear: x_TI, y_TO, float32 on the CPU."""

    x_TI: Tensor
    y_TO: Tensor


@dataclass(slots=True, eq=False)
class _Call:
    """What is kept of one call of a linear; `place`: batch and block, to put calls in order."""

    place: tuple[int, int]
    x_RI: Tensor
    g_RO: Tensor | None = None
    few: LayerActivations | None = None


@dataclass(slots=True, eq=False)
class _Kept:
    """What is kept of one linear."""

    calls: list[_Call] = field(default_factory=list)
    moment: SecondMoment | None = None
    seen: int = 0


class Recorder:
    """Hooks on the linears of units, and what they keep until it is taken.

    Args:
        model: whose linears are hooked.
        request: what to keep.
        sampler: which rows.
        masks: (batch, positions) of each batch, True where a token is not padding.
        get_batch: tells which batch runs.
    """

    def __init__(
        self,
        model: LoadedModel,
        request: SampleRequest,
        sampler: RowSampler,
        masks: list[Tensor],
        get_batch: Callable[[], int],
    ) -> None:
        self._model, self._request = model, request
        self._sampler, self._masks, self._get_batch = sampler, masks, get_batch
        self._tokens = [int(mask.sum()) for mask in masks]
        self._kept: dict[str, _Kept] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    @contextmanager
    def record(self, block: int, units: Iterable[Unit]) -> Iterator[None]:
        """Keep what flows through the linears of these units, as a part of `block`."""
        with ExitStack() as stack:
            for spec in (layer for unit in units for layer in unit.layers):
                hook = self._make_hook(spec, block)
                stack.callback(self._model.linear(spec.name).register_forward_hook(hook).remove)
            yield
        self._last = (None, "")

    def _flatten(self, x: Tensor) -> Tensor:
        return flatten_rows(x.detach(), self._masks[self._get_batch()])

    def select_few(self, rows: Tensor) -> Tensor:
        """Return the rows whose activations are kept, float32 on the CPU."""
        rows_MF = self._flatten(rows)
        index = self._sampler.get_few(self._get_batch(), len(rows_MF))
        return rows_MF[index.to(rows.device)].float().cpu()

    def _make_hook(self, spec: LayerSpec, block: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            kept = self._kept.setdefault(spec.name, _Kept())
            x_MI = self._flatten(args[0])
            batch = self._get_batch()
            index = self._sampler.get_rows(batch, len(x_MI))
            tokens = len(x_MI) == self._masks[batch].numel()
            kept.seen += self._tokens[batch] if tokens else len(x_MI)
            # without gradients nobody needs the inputs
            x_RI = self._keep_input(spec, args[0], index[: None if self._request.gradients else 0])
            call = _Call((batch, block), x_RI)
            kept.calls.append(call)
            if self._request.activations:
                call.few = self._keep_activations(spec, args[0], output)
            if output.requires_grad:
                mask_BT = self._masks[batch]
                output.register_hook(_make_gradient_hook(spec, call, index, mask_BT))

        return hook

    def _keep_input(self, spec: LayerSpec, x: Tensor, index: Tensor) -> Tensor:
        """Return the rows of an input, and add all of it to the layer's moment."""
        kept, (last, reader) = self._kept[spec.name], self._last
        if last is x:  # q, k and v read the same tensor: keep it once
            kept.moment = self._kept[reader].moment
            return self._kept[reader].calls[-1].x_RI
        x_MI = self._flatten(x)
        rows = x_MI[index.to(x_MI.device)].float().cpu()
        if not is_finite(rows):
            raise build_not_finite_error(f"the input of layer {spec.name}")
        self._last = (x, spec.name)
        if self._request.moments and x_MI.shape[1] <= self._request.features:
            kept.moment = kept.moment or SecondMoment(x_MI.shape[1], x_MI.device)
            mask = self._masks[self._get_batch()].flatten()
            kept.moment.add(x_MI[mask] if len(mask) == len(x_MI) else x_MI)
        return rows

    def _keep_activations(self, spec: LayerSpec, x: Tensor, y: Tensor) -> LayerActivations:
        few = LayerActivations(x_TI=self.select_few(x), y_TO=self.select_few(y))
        if not is_finite(few.y_TO):
            raise build_not_finite_error(f"the output of layer {spec.name}")
        return few

    def take(
        self, units: Iterable[Unit], output_rows: int
    ) -> tuple[dict[str, LayerSample], dict[str, LayerActivations]]:
        """Return samples and activations by layer name, and forget them.

        Layers that never ran are left out; calls are joined batch by batch.
        """
        specs = [spec for unit in units for spec in unit.layers if spec.name in self._kept]
        joined: dict[tuple[int, ...], Tensor] = {}
        samples, activations = {}, {}
        for spec in specs:
            kept = self._kept.pop(spec.name)
            kept.calls.sort(key=lambda call: call.place)
            inputs = [call.x_RI for call in kept.calls]
            key = tuple(id(part) for part in inputs)
            x_TI = joined[key] = joined[key] if key in joined else torch.cat(inputs)
            samples[spec.name] = LayerSample(
                x_TI=x_TI,
                g_TO=_join_gradients(kept.calls, spec) if self._request.gradients else None,
                moment=kept.moment,
                scale=kept.seen / max(len(x_TI) * output_rows, 1),
            )
            if self._request.activations:
                activations[spec.name] = _join_activations(kept.calls)
        return samples, activations


def _make_gradient_hook(spec: LayerSpec, call: _Call, index: Tensor, mask_BT: Tensor) -> Any:
    def hook(gradient: Tensor) -> None:
        g_MO = flatten_rows(gradient, mask_BT)
        rows = g_MO[index.to(g_MO.device)].float().cpu()
        if not is_finite(rows):
            raise build_not_finite_error(f"the gradient of layer {spec.name}")
        call.g_RO = rows

    return hook


def _join_gradients(calls: list[_Call], spec: LayerSpec) -> Tensor:
    """Join gradient rows; zeros for a call that the output does not depend on."""
    width = spec.shape[0]
    return torch.cat([torch.zeros(len(c.x_RI), width) if c.g_RO is None else c.g_RO for c in calls])


def _join_activations(calls: list[_Call]) -> LayerActivations:
    few = [call.few for call in calls if call.few is not None]
    return LayerActivations(
        x_TI=torch.cat([each.x_TI for each in few]), y_TO=torch.cat([each.y_TO for each in few])
    )
