"""The hooks of a sampling pass: what they keep of each linear, and how it is put together.

See `cptq.calibration.samples` for what it is good for. A linear's input is recognised as shared by
identity: the second and third reader of one tensor keep no copy. A linear that is called more than
once in a forward pass keeps rows of every call; gradients, which arrive in the reverse order, go to
the slot of their call. Rows are kept where gradients are asked for, at `Positions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.finite import finite, not_finite
from cptq.calibration.objective import Objective, real_tokens
from cptq.calibration.positions import Positions
from cptq.calibration.replay import body, forward
from cptq.calibration.slices import Rows
from cptq.calibration.views import Views
from cptq.checkpoint.model import LoadedModel
from cptq.numerics.hessian import SecondMoment
from cptq.types import LayerSpec

#: largest layer input whose full second moment is summed in the pass
MOMENT_FEATURES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What a pass keeps: gradients with the input rows they belong to, moments, views.

    `views` is the number of tokens at which inputs and outputs are kept (`cptq.calibration.views`).
    """

    gradients: bool = False
    label_gradients: bool = False
    moments: bool = False
    views: int = 0

    def __or__(self, other: Wants) -> Wants:
        """What either wants."""
        return Wants(
            **{f: max(getattr(self, f), getattr(other, f)) for f in self.__dataclass_fields__}
        )

    @property
    def backward(self) -> bool:
        return self.gradients or self.label_gradients


@dataclass(slots=True, kw_only=True, eq=False)
class LayerSample:
    """What went through one linear. float32 on the CPU.

    x_TI: input rows, none without gradients; g_TO, label_g_TO: gradient rows, None where not asked
    for. Layers that read the same input share `x_TI` and `moment`. `scale` turns a sum over the
    rows into nats per row of the answer: tokens seen / (rows kept * rows of the answer).
    """

    x_TI: Tensor
    g_TO: Tensor | None
    label_g_TO: Tensor | None
    moment: SecondMoment | None
    scale: float


@dataclass(slots=True, eq=False)
class _Kept:
    """Row pieces of one linear while the pass runs."""

    x: list[Tensor] = field(default_factory=list)
    g: list[Tensor | None] = field(default_factory=list)
    label_g: list[Tensor | None] = field(default_factory=list)
    moment: SecondMoment | None = None
    seen: int = 0


class Collector:
    """The hooks and what they keep; one instance per pass."""

    def __init__(self, model: LoadedModel, wants: Wants, seed: int, keep: int) -> None:
        self._model = model
        self._wants = wants
        self._specs = [layer for unit in model.units for layer in unit.layers]
        self._kept = {spec.name: _Kept() for spec in self._specs}
        self._positions = Positions(seed, keep, wants.views)
        self._directions = torch.Generator().manual_seed(seed + 1)
        self._phase = "g"
        self._labelled = False
        self._mask = torch.empty(0)
        self._last: tuple[Tensor | None, str] = (None, "")
        self.views = Views(model, self._positions)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Hooks in place, parameters frozen; everything as before afterwards."""
        module = self._model.module
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        with ExitStack() as stack:
            stack.callback(lambda: [p.requires_grad_(flag) for p, flag in flags])
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(torch.set_grad_enabled(self._wants.backward))
            yield

    def _hooks(self) -> Iterator[Any]:
        if self._wants.backward:
            embedding: nn.Module = self._model.module.get_input_embeddings()  # type: ignore[operator]
            yield embedding.register_forward_hook(_differentiable)
        for spec in self._specs:
            yield self._model.linear(spec.name).register_forward_hook(self._layer_hook(spec))
        if self._wants.views:
            yield from self.views.hooks()

    def run(self, batch: Rows, objective: Objective, quota: int) -> int:
        """One micro-batch forward and backward; rows of its answer, 0 where none is needed."""
        self._mask = real_tokens(batch)
        self._last = (None, "")
        self._positions.choose(self._mask, quota)
        if not self._wants.backward:
            return self._forward_only(batch)
        answer_RV = objective.answer(forward(self._model, batch), batch)
        self._check(answer_RV)
        if self._wants.gradients:
            both = self._wants.label_gradients
            self._backward("g", answer_RV, objective.direction(answer_RV, self._directions), both)
        if self._wants.label_gradients:
            labels_RV = objective.label_direction(answer_RV, batch)
            if labels_RV is not None:
                self._labelled = True
                self._backward("label_g", answer_RV, labels_RV, retain=False)
        return answer_RV.shape[0]

    def _forward_only(self, batch: Rows) -> int:
        self._check(body(self._model, batch))
        return 0

    @staticmethod
    def _check(output: Tensor) -> None:
        if not finite(output):
            raise not_finite("the model's output")

    def _backward(self, phase: str, answer_RV: Tensor, d_RV: Tensor, retain: bool) -> None:
        self._phase = phase
        answer_RV.backward(d_RV.to(answer_RV.dtype), retain_graph=retain)

    def _chosen(self, length: int) -> Tensor:
        """Rows kept of an input with `length` rows."""
        return self._positions.of(length)[: None if self._wants.backward else 0]

    def _layer_hook(self, spec: LayerSpec) -> Any:
        kept = self._kept[spec.name]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x_MI = args[0].detach().reshape(-1, args[0].shape[-1])
            index = self._chosen(len(x_MI))
            tokens = len(x_MI) == self._mask.numel()
            kept.seen += int(self._mask.sum()) if tokens else len(x_MI)
            self._keep_input(kept, spec, args[0], x_MI, index)
            kept.g.append(None)
            kept.label_g.append(None)
            if output.requires_grad:
                output.register_hook(self._gradient_hook(kept, spec, len(kept.g) - 1, index))

        return hook

    def _keep_input(
        self, kept: _Kept, spec: LayerSpec, x: Tensor, x_MI: Tensor, index: Tensor
    ) -> None:
        if self._last[0] is x:  # q, k and v read the same tensor: keep it once
            owner = self._kept[self._last[1]]
            kept.x.append(owner.x[-1])
            kept.moment = owner.moment
            return
        rows = x_MI[index.to(x_MI.device)].float().cpu()
        if not finite(rows):
            raise not_finite(f"the input of layer {spec.name}")
        kept.x.append(rows)
        self._last = (x, spec.name)
        if self._wants.moments and x_MI.shape[1] <= MOMENT_FEATURES:
            kept.moment = kept.moment or SecondMoment(x_MI.shape[1], x_MI.device)
            mask = self._mask.flatten()
            kept.moment.add(x_MI[mask] if len(mask) == len(x_MI) else x_MI)

    def _gradient_hook(self, kept: _Kept, spec: LayerSpec, slot: int, index: Tensor) -> Any:
        def hook(gradient: Tensor) -> None:
            g_MO = gradient.reshape(-1, gradient.shape[-1])
            rows = g_MO[index.to(g_MO.device)].float().cpu()
            if not finite(rows):
                raise not_finite(f"the gradient of layer {spec.name}")
            getattr(kept, self._phase)[slot] = rows

        return hook

    def layers(self, answers: int) -> dict[str, LayerSample]:
        """What was kept, joined; layers that never ran are left out."""
        joined: dict[tuple[int, ...], Tensor] = {}
        result = {}
        for spec in self._specs:
            kept = self._kept[spec.name]
            if not kept.x:
                continue
            key = tuple(id(part) for part in kept.x)
            if key not in joined:
                joined[key] = torch.cat(kept.x)
            result[spec.name] = LayerSample(
                x_TI=joined[key],
                g_TO=_joined(kept.g, kept.x, spec) if self._wants.gradients else None,
                label_g_TO=_joined(kept.label_g, kept.x, spec) if self._labelled else None,
                moment=kept.moment,
                scale=kept.seen / max(len(joined[key]) * answers, 1),
            )
            kept.g, kept.label_g = [], []  # half the memory is in the pieces
        return result


def _joined(parts: list[Tensor | None], x: list[Tensor], spec: LayerSpec) -> Tensor:
    """Gradient rows; zeros for a call that the answer does not depend on."""
    width = spec.shape[0]
    return torch.cat(
        [torch.zeros(len(r), width) if g is None else g for g, r in zip(parts, x, strict=True)]
    )


def _differentiable(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Make what leaves the embedding the leaf that gradients flow back to."""
    # a leaf must not be changed in place by what follows: hand on a copy
    return output.detach().requires_grad_().clone()
