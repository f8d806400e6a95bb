"""Compressors, and the drivers that apply them to a layer, a block and a whole model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Entry, Facts, Registry

if TYPE_CHECKING:
    from cptq.compression.layer import Compressor

#: --compressor
COMPRESSORS: Registry[Compressor] = Registry(
    "compressor",
    {
        "gptq": Entry(
            "cptq.compression.gptq:compress",
            Facts(
                does="column by column, errors passed on to the columns that follow",
                source="GPTQ (arXiv 2210.17323)",
                cost="two passes over the text, a factorization per layer",
                good="4 bits: perplexity 1.14x of dense, nearest 2.12x (SmolLM2-135M, uniform)",
            ),
        ),
        "gptaq": Entry(
            "cptq.compression.gptq:compress",
            Facts(
                does="GPTQ towards a target that makes up for errors of earlier units",
                source="GPTAQ (arXiv 2504.02692)",
                cost="as gptq, and half a pass of the dense model",
                good="default: KL 0.68x of gptq at equal bytes (stories260k, 3 bits)",
            ),
        ),
        "nearest": Entry(
            "cptq.compression.nearest:compress",
            Facts(
                does="every weight to the nearest point of its grid",
                cost="no text, seconds",
                good="a quick look; 3 bits: perplexity 7.5x of dense",
            ),
        ),
    },
)
#: those that take the units of a block one after the other, each towards the weight that makes up
#: for errors before it (`numerics.asymmetric_target`)
CORRECTING = ("gptaq",)
#: those that use weights alone and need no forward pass of the model
WITHOUT_ACTIVATIONS = ("nearest",)
