"""Turning dense weights into codes and scales, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.compression.problem import Compressor

#: --compressor
COMPRESSORS: Registry[Compressor] = Registry(
    "compressor",
    {
        "gptq": "cptq.compression.gptq:compress",
        "nearest": "cptq.compression.nearest:compress",
    },
)
#: those that look at weights alone, so that nothing need flow through the model for them
WITHOUT_ACTIVATIONS = ("nearest",)
