"""What goes into and comes out of every linear, and out of every block, at a few tokens.

For metrics that compare representations (`cptq.sensitivity.cca`), which need some hundred tokens
where those that weigh errors need a thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cptq.calibration.finite import finite, not_finite
from cptq.calibration.positions import Positions
from cptq.checkpoint.model import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerView:
    """The same tokens before and after one linear: x_TI, y_TO, float32 on the CPU."""

    x_TI: Tensor
    y_TO: Tensor


@dataclass(slots=True, eq=False)
class _Pieces:
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)


class Views:
    """The hooks and what they keep."""

    def __init__(self, model: LoadedModel, positions: Positions) -> None:
        self._model = model
        self._positions = positions
        self._layers: dict[str, _Pieces] = {}
        self._blocks: list[list[Tensor]] = [[] for _ in model.block_names]

    def hooks(self) -> Iterator[Any]:
        """Register them; handles to remove them with."""
        for unit in self._model.units:
            for spec in unit.layers:
                pieces = self._layers[spec.name] = _Pieces()
                hook = self._layer_hook(pieces, spec.name)
                yield self._model.linear(spec.name).register_forward_hook(hook)
        for block, kept in zip(self._model.blocks, self._blocks, strict=True):
            yield block.register_forward_hook(self._block_hook(kept))

    def _layer_hook(self, pieces: _Pieces, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            pieces.x.append(self._few(args[0]))
            pieces.y.append(self._few(output))
            if not finite(pieces.y[-1]):
                raise not_finite(f"the output of layer {name}")

        return hook

    def _block_hook(self, kept: list[Tensor]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            kept.append(self._few(output[0] if isinstance(output, tuple) else output))

        return hook

    def _few(self, rows: Tensor) -> Tensor:
        rows_MF = rows.detach().reshape(-1, rows.shape[-1])
        return rows_MF[self._positions.few(len(rows_MF)).to(rows.device)].float().cpu()

    def layers(self) -> dict[str, LayerView]:
        """Views by layer name; a layer that never ran has none."""
        return {
            name: LayerView(x_TI=torch.cat(pieces.x), y_TO=torch.cat(pieces.y))
            for name, pieces in self._layers.items()
            if pieces.x
        }

    def blocks(self) -> list[Tensor]:
        """Output rows (tokens, width) of every block that ran, in order."""
        return [torch.cat(parts) for parts in self._blocks if parts]
