"""File formats by name. Importing this loads no torch.

A format is a `cptq.artifact.formats.interface.Format`: one file here, one line below. The half of
it that knows no torch, a `cptq.layouts.Layout`, is what budgets are counted with.
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
