"""Compressors, and the drivers that apply them to a layer, a block and a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.compression.layer import Compressor

#: --compressor
COMPRESSORS: Registry[Compressor] = Registry(
    "compressor",
    {
        "gptq": "cptq.compression.gptq:compress",
        "nearest": "cptq.compression.nearest:compress",
    },
)
#: those that use weights alone and need no forward pass of the model
WITHOUT_ACTIVATIONS = ("nearest",)
