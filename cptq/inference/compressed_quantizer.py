"""Open compressed-tensors checkpoints packed: the method `cptq-compressed-tensors` of transformers.

No file names this method. `cptq.load` puts it in place of `compressed-tensors` in the config that
it hands to `from_pretrained`; plain `from_pretrained` goes on to do what stock transformers does.

Before the weights are read, packed linears and 8-bit floats get their modules (on the meta device),
after the headers of the files were compared with the model (`inference.compressed_tensors`). A head
tied to an embedding of 8-bit floats shares its bytes. While they are read, `X.weight_packed` is
renamed `X.weight`. Tensors are mapped from the file or read one by one; there is no dense copy.

`save_pretrained` writes the compressed-tensors checkpoint again: the same names, types, words and
`quantization_config`; dense tensors have the type that the model was loaded in, as always.
`model.dequantize()` returns the dense model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from cptq.errors import ArtifactError
from cptq.inference.compressed_tensors import (
    PACKED,
    SCALE,
    SHAPE,
    PackedPlan,
    UnsupportedError,
    plan_packing,
    read_groups,
)
from cptq.inference.float8 import STORED, find_float8_modules, make_float8_module
from cptq.inference.modules import find_packed_modules, make_packed_module
from cptq.inference.quantizer import PackedQuantizer
from cptq.numerics.float8 import FORMATS

METHOD = "cptq-compressed-tensors"
#: types of scales in safetensors
_SCALE_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    **{name: FORMATS[kind] for name, kind in STORED.items()},
}


class OwnCompressedTensorsConfig(QuantizationConfigMixin):
    """Holds the `quantization_config` of a compressed-tensors checkpoint, as it will be saved."""

    def __init__(self, stock: Mapping[str, Any], **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of those it knows
        self.stock = dict(stock)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json: that of compressed-tensors."""
        return deepcopy(self.stock)


class OwnCompressedTensorsQuantizer(PackedQuantizer):
    """Loads compressed-tensors checkpoints."""

    quantization_config: OwnCompressedTensorsConfig

    def __init__(self, quantization_config: OwnCompressedTensorsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._scales: dict[str, str] = {}
        self._renaming: WeightRenaming | None = None

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        plan = plan_packing(model, files, read_groups(self.quantization_config.stock))
        self._scales = dict(plan.scales)
        _replace_linears(model, plan)
        _replace_float8(model, plan)
        unexpected: Any = model
        unexpected._keys_to_ignore_on_load_unexpected |= {rf"\.{SHAPE}$"}  # compared already

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """Rename the codes while they are read."""
        self._renaming = WeightRenaming(rf"\.{PACKED}$", ".weight")
        return [self._renaming]

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Keep the bytes of 8-bit floats, whose place in the model has the type uint8."""
        return None if dtype is torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        super()._process_model_after_weight_loading(model)
        _view_as_bytes(model)
        loaded: Any = model  # saving renames in `get_state_dict_and_metadata`
        loaded._weight_conversions = [
            change for change in loaded._weight_conversions if change is not self._renaming
        ]
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], Any]:
        """Return the tensors of the file."""
        state = dict(model.state_dict())
        for name, module in find_packed_modules(model).items():
            dtype = _SCALE_TYPES[self._scales[name]]
            state[f"{name}.{PACKED}"] = state.pop(f"{name}.weight")
            state[f"{name}.{SCALE}"] = state[f"{name}.{SCALE}"].to(dtype)
            state[f"{name}.{SHAPE}"] = torch.tensor(module.shape)
        for name, floats in find_float8_modules(model).items():
            state[f"{name}.weight"] = floats.floats
        return state, {}


def _replace_linears(model: nn.Module, plan: PackedPlan) -> None:
    for name, scheme in plan.linears.items():
        packed = make_packed_module(model.get_submodule(name), scheme)
        assert packed is not None  # `plan_packing` has checked the class
        model.set_submodule(name, packed)


def _replace_float8(model: Any, plan: PackedPlan) -> None:
    """Replace modules of 8-bit floats, and heads that are tied to them."""
    ties = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in model.all_tied_weights_keys.items()
        if target.endswith(".weight")
    }
    tied = {head: plan.float8[owner] for head, owner in ties.items() if owner in plan.float8}
    for name, kind in {**plan.float8, **tied}.items():
        module = make_float8_module(model.get_submodule(name), kind)
        if module is None:
            raise UnsupportedError(f"it has {name} in 8-bit floats, which is of a class of its own")
        model.set_submodule(name, module)


def _view_as_bytes(model: nn.Module) -> None:
    """Turn what was read as 8-bit floats into bytes, once where modules share them."""
    seen: dict[int, nn.Parameter] = {}
    for name, module in find_float8_modules(model).items():
        read = module.weight
        if id(read) in seen:
            module.weight = seen[id(read)]
            continue
        module.weight = nn.Parameter(read.detach().view(torch.uint8), requires_grad=False)
        seen[id(read)] = module.weight
        if not module.is_finite():
            raise ArtifactError(
                f"{name}.weight holds NaN or infinity", hint="download or copy the artifact again"
            )


def register() -> None:
    """Register the method with transformers, once per process."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(OwnCompressedTensorsConfig)
        register_quantizer(METHOD)(OwnCompressedTensorsQuantizer)
