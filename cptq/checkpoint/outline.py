"""A checkpoint without its weights: its modules on torch's meta device, with the inventory.

Config, tokenizer settings and headers of the weight files are read, and the same doors are passed
as when it is loaded, but for those that look at values. Forward order, use and fused inputs are
observed on a forward of the meta modules. Where a family cannot run there, because its path depends
on values (a mixture of experts), every matrix counts as used, in the order of the modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
import transformers
from torch import nn

from cptq.checkpoint.architectures import Architecture, get_architecture
from cptq.checkpoint.experts import unstack_experts
from cptq.checkpoint.files import read_config
from cptq.checkpoint.inventory import Inventory, Trace, find_blocks, list_matrices, take_inventory
from cptq.checkpoint.load_errors import explain_load_errors, refuse_library_errors
from cptq.checkpoint.loader import check_checkpoint, choose_auto_class
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.stored import list_stored_tensors
from cptq.config import ModelSettings
from cptq.errors import ModelError
from cptq.types import Event, ModelKind, TensorSpec


def outline_model(settings: ModelSettings, *, conv1d: bool) -> tuple[LoadedModel, bool]:
    """Read what `compress` would work on, without weights and without a tokenizer.

    Returns the model, and whether a forward was observed.

    Args:
        settings: a directory, and whether its code may run.
        conv1d: count a Conv1D as compressible.

    Raises:
        ModelError: `compress` would refuse it.
    """
    path = Path(settings.model)
    with refuse_library_errors(settings.model):
        plain, kind, _, stored = check_checkpoint(settings, path, dense=True)
        family = get_architecture(str(plain.get("model_type")))
        with explain_load_errors(settings.model):
            module = _build_on_meta(path, kind, settings.trust_remote_code)
        unstack_experts(module, stored)
        tensors = list_stored_tensors(module, stored)
        found, traced = _take_inventory(module, family, tensors, conv1d)
    model = LoadedModel(
        source=settings.model,
        path=path,
        module=module,
        tokenizer=None,
        config=cast(transformers.PretrainedConfig, module.config),
        kind=kind,
        family=family.family,
        tensors=tensors,
        fingerprint="",
        quantized=False,
        device=torch.device("meta"),
        dtype=torch.float32,
        block_names=found.block_names,
        layers=found.layers,
        units=found.units,
        vocabulary=found.vocabulary,
    )
    return model, traced


def _build_on_meta(path: Path, kind: ModelKind, trusted: bool) -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    config._attn_implementation = "eager"  # plain products, which run without values
    with torch.device("meta"):
        auto = getattr(transformers, choose_auto_class(read_config(path), kind))
        module: nn.Module = auto.from_config(config, trust_remote_code=trusted)
    # families look for it in the input, which has no values
    cast(transformers.PretrainedConfig, module.config).pad_token_id = None
    return module.eval()


def _take_inventory(
    module: nn.Module, family: Architecture, tensors: tuple[TensorSpec, ...], conv1d: bool
) -> tuple[Inventory, bool]:
    named = {spec.name: spec for spec in tensors}
    try:
        return take_inventory(module, family, named, _ignore, conv1d=conv1d), True
    except ModelError:
        find_blocks(module, family)  # raises again where there are none
        names = list_matrices(module)
        trace = Trace(order=names, inputs={name: torch.empty(0) for name in names})
        found = take_inventory(module, family, named, _ignore, conv1d=conv1d, trace=trace)
        return found, False


def _ignore(_event: Event) -> None:
    """Drop notices: what stays dense is in the layers."""
