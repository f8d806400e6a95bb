"""The quantization method `cptq` of transformers: its config and its quantizer.

Before the weights are read, each module that config.json lists is replaced by a packed module of
the same name and shape (on the meta device). The file headers are compared with the schemes first,
so that a file that does not fit is refused before memory is allocated. If the model ties its head
to a packed embedding, the head becomes a packed linear layer, and transformers ties its parameters
to the embedding's.

Interface: transformers >= 5.0, `HfQuantizer` and `QuantizationConfigMixin` (see its contributor
guide "New quantization methods"). `save_pretrained` writes the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cptq.errors import ArtifactError
from cptq.inference.checks import check_header, check_positions, read_modules, read_rules
from cptq.inference.float8 import Float8Module, find_float8_modules
from cptq.inference.modules import (
    PARAMETERS,
    PackedLinear,
    PackedModule,
    find_packed_modules,
    make_packed_module,
)
from cptq.layouts.packed import FORMAT_VERSION, METHOD, NEEDS, WEIGHT_FILES
from cptq.types import Candidate

T = TypeVar("T")


class CptqConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed artifact.

    Args:
        modules: {name of a module: label of its scheme, such as "w4g64-asym"}.
        format_version: version of docs/format-packed.md.
        weights: name of the weight file, if not the usual one; None once the model is in memory,
            because transformers saves under the usual name.
        needs: what to install, for readers of the file.
        activations: activation sparsity: its method and share, and {name of a module: label of its
            rule} as `rules`; None: none.

    Raises:
        ArtifactError: another format version, an unknown scheme or weight file name.
    """

    def __init__(
        self,
        modules: Mapping[str, str] | None = None,
        format_version: int = FORMAT_VERSION,
        weights: str | None = None,
        needs: str = NEEDS,
        activations: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # an enum of those it knows
        self.format_version = format_version
        self.needs = needs
        self.weights = weights
        self.modules = dict(read_modules(modules, format_version))
        read_rules(activations, self.modules, format_version)
        self.activations = None if activations is None else dict(activations)
        if weights is not None and weights not in WEIGHT_FILES:
            raise ArtifactError(
                f"config.json names the weight file {weights!r}", allowed=", ".join(WEIGHT_FILES)
            )

    @property
    def schemes(self) -> dict[str, Candidate]:
        """{name of a module: its scheme}."""
        return {name: Candidate.parse(label) for name, label in self.modules.items()}

    @property
    def rules(self) -> Mapping[str, str]:
        """{name of a module: label of its rule of activation sparsity}."""
        return read_rules(self.activations, self.modules, self.format_version)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json."""
        return {name: value for name, value in vars(self).items() if value is not None}


class PackedQuantizer(HfQuantizer):
    """Base of those that replace modules by packed ones and do not quantize."""

    requires_calibration = True

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for module in find_packed_modules(model).values():
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)  # transformers sets it on all floats
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return make_model_dense(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class CptqQuantizer(PackedQuantizer):
    """Loads what config.json calls `cptq`."""

    quantization_config: CptqConfig

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may make CUDA graphs of the model (`cptq.inference.compiled`).

        Products with sparse weights wait for the GPU, and whether rules are on would be recorded.
        """
        config = self.quantization_config
        return not config.rules and not any(s.sparsity for s in config.schemes.values())

    def update_attn_implementation(self, config: Any) -> Any:
        """Set the name of the weight file; the only hook that runs before files are looked up."""
        if self.quantization_config.weights is not None:
            config.transformers_weights = self.quantization_config.weights
        return config

    #: that hook before transformers 5.18
    update_ep_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or ()]
        schemes = _resolve_names(model, self.quantization_config.schemes)
        rules = _resolve_names(model, self.quantization_config.rules)
        packed = {
            name: _make_packed(model, name, scheme, rules.get(name, ""))
            for name, scheme in schemes.items()
        }
        shapes = {name: (m.shape, m.scheme) for name, m in packed.items()}
        check_header(files, shapes, model, rules)
        for name, module in packed.items():
            model.set_submodule(name, module)
        _tie(model, packed)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        super()._process_model_after_weight_loading(model)
        for name, module in find_packed_modules(model).items():
            check_positions(name, module.packed)
        config: Any = model.config
        if hasattr(config, "transformers_weights"):
            del config.transformers_weights
        self.quantization_config.weights = None
        return model


def make_model_dense(model: Any, dtype: Any) -> Any:
    """Replace every packed module and every one of 8-bit floats by a dense one; ties stay."""
    if isinstance(dtype, str):  # as save_pretrained writes it to the config
        dtype = getattr(torch, dtype)
    modules: dict[str, PackedModule | Float8Module]
    modules = {**find_packed_modules(model), **find_float8_modules(model)}
    for name, module in modules.items():
        model.set_submodule(name, module.make_dense(dtype or module.dtype))
    vars(model).pop("_tied_weights_keys", None)  # use those of the class again
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
    return model


def register() -> None:
    """Register the method with transformers, once per process."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(CptqConfig)
        register_quantizer(METHOD)(CptqQuantizer)


def _resolve_names(model: nn.Module, schemes: Mapping[str, T]) -> dict[str, T]:
    """Return schemes, or rules, by the names of the modules in this model.

    A base model may be loaded from a file written with a head, and the reverse; transformers then
    drops or adds the prefix of tensor names, and this does the same.
    """
    prefix = f"{model.base_model_prefix}."
    known = {name for name, _ in model.named_modules()}
    found: dict[str, T] = {}
    for name, scheme in schemes.items():
        names = (name, name.removeprefix(prefix), prefix + name)
        place = next((other for other in names if other in known), None)
        if place is not None:
            found[place] = scheme
        elif model.base_model is not model or name.startswith(prefix):
            raise ArtifactError(
                f"config.json packs {name!r}, which {type(model).__name__} does not have"
            )
        # otherwise it belongs to a head that is not loaded
    return found


def _make_packed(model: nn.Module, name: str, scheme: Candidate, rule: str) -> PackedModule:
    module = model.get_submodule(name)
    packed = make_packed_module(module, scheme, rule)
    if packed is None:
        raise ArtifactError(
            f"config.json packs {name!r}, of type {type(module).__name__}, as {scheme.label}",
            allowed="linear layers, Conv1D, and embeddings without sparsity or rules",
        )
    return packed


def _tie(model: Any, packed: Mapping[str, PackedModule]) -> None:
    """Tie all parameters of a head to those of the packed embedding that it shares."""
    ties: dict[str, str] = {}
    for target, source in model.all_tied_weights_keys.items():
        head, owner = target.removesuffix(".weight"), packed.get(source.removesuffix(".weight"))
        if owner is None or not target.endswith(".weight"):
            continue
        module = model.get_submodule(head)
        bias = getattr(module, "bias", None) is not None
        model.set_submodule(head, PackedLinear(owner.shape, owner.scheme, bias=bias))
        ties |= {
            f"{head}.{part}": f"{source.removesuffix('.weight')}.{part}"
            for part in PARAMETERS.values()
            if getattr(owner, part) is not None
        }
    if ties:
        model.all_tied_weights_keys = model.all_tied_weights_keys | ties
        model._tied_weights_keys = dict(model._tied_weights_keys or {}) | ties
