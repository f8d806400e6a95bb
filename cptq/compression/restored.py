"""Have a model compute with compressed layers, multiplied out where and when they are needed.

What is in memory meanwhile are the codes. A block is multiplied out when it is loaded
(`cptq.checkpoint.resident`); of a token embedding only the rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import make_weight
from cptq.numerics.grid import dequantize_layer
from cptq.types import CompressedLayer

#: the tensors of a layer that have a row for each output, where they are there
_BY_ROWS = ("codes", "scale", "zero", "mask")


class Restored:
    """Makes the weight (out, in) of a compressed layer, in a type and on a device."""

    def __init__(self, layer: CompressedLayer, device: torch.device, dtype: torch.dtype) -> None:
        self._layer, self._device, self._dtype = layer, device, dtype

    def __call__(self) -> Tensor:
        """Return the weight."""
        return dequantize_layer(move_layer(self._layer, self._device), self._dtype)

    def take_rows(self, ids: Tensor) -> Tensor:
        """Return rows (..., in) of it, the same to the bit."""
        rows_R = ids.reshape(-1).to(self._layer.codes.device)
        some = {
            name: tensor.view(torch.uint8)[rows_R].view(tensor.dtype)
            if tensor.dtype.itemsize == 1
            else tensor[rows_R]
            for name in _BY_ROWS
            if (tensor := getattr(self._layer, name)) is not None
        }
        found_RI = Restored(replace(self._layer, **some), self._device, self._dtype)()
        return found_RI.view(*ids.shape, -1)


def restore_layers(model: LoadedModel, layers: Iterable[CompressedLayer]) -> None:
    """Let a model compute with compressed layers."""
    for layer in layers:
        restored = Restored(layer, model.device, model.dtype)
        make_weight(model.linear(layer.spec.name), restored)


def move_layer(layer: CompressedLayer, device: torch.device) -> CompressedLayer:
    """Return a layer with its tensors on a device; those that are there are shared."""
    return replace(
        layer, **{n: t.to(device) for n in _BY_ROWS if (t := getattr(layer, n)) is not None}
    )
