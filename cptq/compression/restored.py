"""Have a model compute with compressed layers, multiplied out where and when they are needed.

What is in memory meanwhile are the codes, or where memory is short not even these (`KeptLayer`). A
block is multiplied out when it is loaded (`cptq.checkpoint.resident`); of a token embedding only
the rows that are looked up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.pages import MappedFiles
from cptq.checkpoint.spill import Spill
from cptq.checkpoint.weights import make_weight
from cptq.numerics.grid import dequantize_layer
from cptq.types import CompressedLayer

#: the tensors of a layer that have a row for each output, where they are there
_BY_ROWS = ("codes", "scale", "zero", "mask")


class KeptLayer:
    """A compressed layer whose tensors a spill keeps: in memory up to its limit, else in files."""

    def __init__(self, layer: CompressedLayer, spill: Spill) -> None:
        self.spec, self._result = layer.spec, layer.result
        found = {name: getattr(layer, name) for name in _BY_ROWS}
        self._kept = {n: None if t is None else spill.keep(t) for n, t in found.items()}

    def get(self) -> CompressedLayer:
        """Return the layer."""
        tensors: dict[str, Any] = {n: k and k.get() for n, k in self._kept.items()}
        return CompressedLayer(spec=self.spec, result=self._result, **tensors)


class Restored:
    """Makes the weight (out, in) of a compressed layer, in a type and on a device."""

    def __init__(
        self, layer: CompressedLayer | KeptLayer, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._source, self._device, self._dtype = layer, device, dtype

    @property
    def _layer(self) -> CompressedLayer:
        return self._source.get() if isinstance(self._source, KeptLayer) else self._source

    def __call__(self) -> Tensor:
        """Return the weight."""
        return dequantize_layer(move_layer(self._layer, self._device), self._dtype)

    def take_rows(self, ids: Tensor) -> Tensor:
        """Return rows (..., in) of it, the same to the bit."""
        layer = self._layer
        rows_R = ids.reshape(-1).to(layer.codes.device)
        some = {
            name: tensor.view(torch.uint8)[rows_R].view(tensor.dtype)
            if tensor.dtype.itemsize == 1
            else tensor[rows_R]
            for name in _BY_ROWS
            if (tensor := getattr(layer, name)) is not None
        }
        found_RI = Restored(replace(layer, **some), self._device, self._dtype)()
        return found_RI.view(*ids.shape, -1)

    def drop_pages(self, files: MappedFiles) -> None:
        """Give back the pages of codes that are mapped from a file; they are read again."""
        if isinstance(self._source, KeptLayer):
            return
        for name in _BY_ROWS:
            if (tensor := getattr(self._source, name)) is not None:
                files.drop_pages(tensor)


def restore_layers(model: LoadedModel, layers: Iterable[CompressedLayer | KeptLayer]) -> None:
    """Let a model compute with compressed layers."""
    for layer in layers:
        restored = Restored(layer, model.device, model.dtype)
        make_weight(model.linear(layer.spec.name), restored)


def place_layer(model: LoadedModel, layer: CompressedLayer) -> CompressedLayer:
    """Return a layer where it waits: on the device that holds the whole model, else outside."""
    return move_layer(layer, model.device if model.held_whole else torch.device("cpu"))


def move_layer(layer: CompressedLayer, device: torch.device) -> CompressedLayer:
    """Return a layer with its tensors on a device; those that are there are shared."""
    return replace(
        layer, **{n: t.to(device) for n in _BY_ROWS if (t := getattr(layer, n)) is not None}
    )
