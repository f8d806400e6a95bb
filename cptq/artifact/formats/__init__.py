"""File formats by name. Importing this module does not import torch.

A format is a `cptq.artifact.formats.interface.Format`: one file here and one line below. Its
torch-free part, a `cptq.layouts.Layout`, is what budgets are counted with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Entry, Facts, Registry

if TYPE_CHECKING:
    from cptq.artifact.formats.interface import Format

#: name -> a `Format`
FORMATS: Registry[Format] = Registry(
    "format",
    {
        "compressed-tensors": Entry(
            "cptq.artifact.formats.compressed_tensors:COMPRESSED_TENSORS",
            Facts(
                does="symmetric 2 to 8 bits, 8-bit floats",
                source="vLLM's compressed-tensors",
                good="transformers and vLLM without cptq; with it 4.6x the decoding of dense",
            ),
        ),
        "dense": Entry(
            "cptq.artifact.formats.dense:DENSE",
            Facts(
                does="everything multiplied out to 16 bits",
                cost="dense size again",
                good="any tool; looking at what compression cost",
            ),
        ),
        "gguf": Entry(
            "cptq.artifact.formats.gguf:GGUF",
            Facts(
                does="3, 4, 5, 6, 8 bits in ggml's blocks, with the tokenizer",
                source="llama.cpp",
                good="llama.cpp: perplexity 27.17 at 105.5 MB, Q4_K_M 28.86 (SmolLM2-135M)",
            ),
        ),
        "packed": Entry(
            "cptq.artifact.formats.packed:PACKED",
            Facts(
                does="everything: zero points, sparsity, 3 to 8 bits of vocabulary",
                source="docs/format-packed.md",
                cost="needs cptq to load",
                good="the smallest: perplexity 29.54 at 67.3 MB, 5.7x the decoding of dense",
            ),
        ),
    },
)
DEFAULT_FORMAT = "compressed-tensors"
