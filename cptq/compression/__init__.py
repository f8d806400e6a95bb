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
        "gptaq": "cptq.compression.gptq:compress",
        "nearest": "cptq.compression.nearest:compress",
    },
)
#: those that take the units of a block one after the other, each towards the weight that makes up
#: for errors before it (`numerics.asymmetric_target`)
CORRECTING = ("gptaq",)
#: those that use weights alone and need no forward pass of the model
WITHOUT_ACTIVATIONS = ("nearest",)
