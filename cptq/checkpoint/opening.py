"""How a checkpoint is opened so that its tensors stay in its files until they are used.

transformers maps a tensor from its file where it keeps the type in which the tensor is stored, and
reads it into memory where it converts it. So a model is opened in the stored type, and
`checkpoint.resident` converts its parts. What a model computes on its own when it is built must be
in the type of the run, though, or the numbers would differ from those of a plain load.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from cptq.checkpoint.architectures import Architecture
from cptq.checkpoint.inventory import find_blocks
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ModelError
from cptq.types import TensorSpec

_ENDS = ("input", "output")


def choose_load_dtype(stored: Mapping[str, TensorSpec], dtype: torch.dtype) -> torch.dtype:
    """Return the type to open a checkpoint in: the stored one, if it is one and `dtype` holds it.

    Its tensors then stay in the files until they are used.
    """
    kinds = {TORCH_DTYPES[spec.dtype] for spec in stored.values()}
    floating = [kind for kind in kinds if kind.is_floating_point]
    if len(floating) == 1 and torch.promote_types(floating[0], dtype) is dtype:
        return floating[0]
    return dtype


def has_rounded_buffers(module: nn.Module) -> bool:
    """Whether the model computed constants in a narrow type that its weights were opened in."""
    stored = module.state_dict()
    return any(
        buffer.is_floating_point() and buffer.dtype.itemsize < 4 and name not in stored
        for name, buffer in module.named_buffers()
    )


def list_parts(module: nn.Module, family: Architecture) -> list[nn.Module]:
    """Return what comes into memory and goes as a whole: vocabulary matrices and blocks."""
    try:
        found = [getattr(module, f"get_{end}_embeddings", lambda: None)() for end in _ENDS]
    except NotImplementedError as error:
        raise ModelError(
            f"{type(module).__name__} has no token embedding that transformers knows of",
            allowed="models that look token ids up in one matrix",
        ) from error
    blocks = [module.get_submodule(name) for name in find_blocks(module, family)]
    return [part for part in found if isinstance(part, nn.Module)] + blocks
