"""File formats by name. Importing this module does not import torch.

A format is a `cptq.artifact.formats.interface.Format`: one file here and one line below. Its
torch-free part, a `cptq.layouts.Layout`, is what budgets are counted with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptq.registry import Registry

if TYPE_CHECKING:
    from cptq.artifact.formats.interface import Format

#: name -> a `Format`
FORMATS: Registry[Format] = Registry(
    "format",
    {
        "compressed-tensors": "cptq.artifact.formats.compressed_tensors:COMPRESSED_TENSORS",
        "dense": "cptq.artifact.formats.dense:DENSE",
        "gguf": "cptq.artifact.formats.gguf:GGUF",
        "packed": "cptq.artifact.formats.packed:PACKED",
    },
)
DEFAULT_FORMAT = "compressed-tensors"
