"""`compressed-tensors`, format `pack-quantized`: symmetric integers of 2 to 8 bits, mixed freely.

Stock transformers loads this exactly (measured with compressed-tensors 0.18 and later): every layer
by its exact name, one `config_groups` entry per distinct scheme, names never overlapping, dense
linear layers listed in `ignore`. Experts are the exception to exact names: transformers stacks them
when it loads, and a regular expression gives their one scheme.

Token embeddings and output heads of 8-bit floats are stored as such under the name of the weight;
stock transformers converts them to the model's type.

A Conv1D is refused here, because transformers silently re-initializes its weights. Codes are packed
from our own integers; the library's `compress` would quantize again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cptq.artifact.content import Content
from cptq.artifact.formats.interface import SafetensorsFormat
from cptq.checkpoint.files import read_config
from cptq.checkpoint.loader import choose_auto_class
from cptq.checkpoint.weights import TORCH_DTYPES, get_dtype_name, get_scale_dtypes
from cptq.errors import ArtifactError
from cptq.layouts.pack_quantized import (
    PACK_QUANTIZED,
    list_float8_tensor,
    list_packed_tensors,
    name_float8_dtype,
)
from cptq.numerics.float8 import FORMATS as FLOAT8
from cptq.numerics.packing import count_words, pack_rows, unpack_rows
from cptq.types import CompressedLayer, LayerResult, LayerSpec, TensorSpec

NAME = "compressed-tensors"
#: rows of a vocabulary that are looked at together
_ROWS = 4096
FORMAT = "pack-quantized"
#: the target that matches all experts in config.json
EXPERTS = r"re:.*\.experts\..*"


class CompressedTensors(SafetensorsFormat):
    """The format described at the top of this module."""

    name = NAME
    layout = PACK_QUANTIZED
    tags = ("compressed-tensors",)
    multiplied_out = True

    def check_layer(self, layer: CompressedLayer) -> None:
        check_layer(layer)

    def list_layer_tensors(self, layer: CompressedLayer) -> tuple[TensorSpec, ...]:
        return list_layer_tensors(layer)

    def pack_layer_tensor(self, layer: CompressedLayer, spec: TensorSpec) -> Tensor:
        return pack_layer_tensor(layer, spec)

    def read_layer(
        self, spec: LayerSpec, result: LayerResult, get: Callable[[str], Tensor]
    ) -> CompressedLayer:
        if result.candidate.float8:
            return _read_float8(spec, result, get(spec.weight_name))
        packed, scale = (get(f"{spec.name}.{part}") for part in ("weight_packed", "weight_scale"))
        bits, (out, inputs) = result.candidate.bits, spec.shape
        if packed.shape != (out, count_words(inputs, bits)) or packed.dtype is not torch.int32:
            raise ArtifactError(f"the packed tensors of {spec.name} do not match the manifest")
        codes = unpack_rows(packed, bits, inputs)
        scale = scale.float() if result.candidate.narrow_scales else scale
        layer = CompressedLayer(spec=spec, result=result, codes=codes, scale=scale)
        check_layer(layer)
        return layer

    def build_quantization_config(self, content: Content) -> dict[str, Any] | None:
        return build_quantization_config(list(content.compressed.values()), content.layers)

    def label(self, content: Content) -> str:
        return f"{NAME} {FORMAT}" if content.compressed else "dense"

    def describe_loading(self, content: Content) -> Sequence[str]:
        lines = format_loading_code(content)
        if content.compressed:
            lines += [
                "Loading needs `compressed-tensors>=0.18`, not cptq. The weights are compressed on "
                "disk; transformers unpacks them in memory at the first forward pass. "
                '`cptq.load("PATH")` keeps them packed on a CPU.',
                "",
            ]
        return lines


def _read_float8(spec: LayerSpec, result: LayerResult, codes: Tensor) -> CompressedLayer:
    ones_OG = torch.ones(spec.shape[0], 1)
    layer = CompressedLayer(spec=spec, result=result, codes=codes, scale=ones_OG)
    check_layer(layer)
    return layer


def format_loading_code(content: Content) -> list[str]:
    """Return the code that loads a directory with transformers, as Markdown lines."""
    auto = choose_auto_class(read_config(content.path), content.kind)
    return [
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'model = {auto}.from_pretrained("PATH")',
        'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        "```",
        "",
    ]


def check_layer(layer: CompressedLayer) -> None:
    """Refuse a layer that the format cannot hold.

    Raises:
        ArtifactError: a Conv1D, which stock transformers would re-initialize; codes or scales of
            a wrong type or shape; a scale of 0.
    """
    spec, name = layer.spec, layer.spec.name
    if layer.result.candidate.float8:
        _check_float8(layer)
        return
    if spec.kind == "conv1d" or spec.transposed:
        raise ArtifactError(
            f"{name} is a Conv1D, whose packed weights stock transformers replaces by random ones",
            allowed="Conv1D layers kept dense (w16)",
        )
    if spec.kind not in ("linear", "head"):
        raise ArtifactError(f"{name} is an {spec.kind}, which {NAME} stores dense")
    out, inputs = spec.shape
    groups = layer.scale.shape[-1]
    if layer.codes.shape != (out, inputs) or layer.codes.dtype is not torch.int8:
        raise ArtifactError(f"{name} has codes {layer.codes.dtype} {tuple(layer.codes.shape)}")
    if layer.scale.shape != (out, groups) or groups < 1 or inputs % groups:
        raise ArtifactError(f"{name} has scales {tuple(layer.scale.shape)} for {inputs} inputs")
    if layer.scale.dtype not in get_scale_dtypes(spec, layer.result.candidate):
        raise ArtifactError(f"{name} has {layer.scale.dtype} scales in a {spec.dtype} checkpoint")
    if not bool((torch.isfinite(layer.scale) & (layer.scale != 0)).all()):
        raise ArtifactError(f"{name} has a scale that is 0, infinite or not a number")


def _check_float8(layer: CompressedLayer) -> None:
    dtype, name = FLOAT8[layer.result.candidate.float8], layer.spec.name
    if layer.codes.dtype is not dtype or layer.codes.shape != layer.spec.shape:
        raise ArtifactError(f"{name} has codes {layer.codes.dtype} {tuple(layer.codes.shape)}")
    if not all(bool(torch.isfinite(rows.float()).all()) for rows in layer.codes.split(_ROWS)):
        raise ArtifactError(f"{name} has a weight that is infinite or not a number")


def list_layer_tensors(layer: CompressedLayer) -> tuple[TensorSpec, ...]:
    """List the tensors of a layer as shapes and types."""
    if layer.result.candidate.float8:
        return (list_float8_tensor(layer.spec, layer.result.candidate),)
    candidate, groups = layer.result.candidate, layer.scale.shape[1]
    kind = candidate.narrow_scales
    narrow = name_float8_dtype(kind) if kind else None
    dtype = narrow or get_dtype_name(layer.scale.dtype)
    return list_packed_tensors(layer.spec, candidate.bits, groups, dtype)


def pack_layer_tensor(layer: CompressedLayer, spec: TensorSpec) -> Tensor:
    """Return the value of one of the tensors of a layer."""
    if layer.result.candidate.float8:
        return layer.codes
    packed, scale, _ = list_layer_tensors(layer)
    if spec.name == packed.name:
        return pack_rows(layer.codes, layer.result.candidate.bits)
    if spec.name == scale.name:
        return layer.scale.to(TORCH_DTYPES[scale.dtype])
    return torch.tensor(layer.spec.shape, dtype=torch.int64)


def get_scheme(layer: CompressedLayer) -> tuple[int, int]:
    """Return bits and group size; 0 means one scale per output channel."""
    return _get_bits(layer), 0 if layer.scale.shape[1] == 1 else _get_group_size(layer)


def _get_bits(layer: CompressedLayer) -> int:
    return layer.result.candidate.bits


def _get_group_size(layer: CompressedLayer) -> int:
    return layer.spec.shape[1] // layer.scale.shape[1]


def build_quantization_config(
    layers: Sequence[CompressedLayer], all_layers: Sequence[LayerSpec]
) -> dict[str, Any] | None:
    """Build the entry of config.json; None if no layer is packed."""
    layers = [layer for layer in layers if not layer.result.candidate.float8]
    if not layers:
        return None
    targets: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        if not layer.spec.expert:
            targets.setdefault(get_scheme(layer), []).append(layer.spec.name)
    groups = [_build_group(key, targets[key]) for key in sorted(targets)]
    experts = find_expert_scheme(layers, all_layers)
    groups += [_build_group(experts, [EXPERTS])] if experts else []
    packed = {layer.spec.name for layer in layers}
    linears = [spec.name for spec in all_layers if spec.kind in ("linear", "head")]
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "ignore": [name for name in linears if name not in packed],
        "kv_cache_scheme": None,
    }


def find_expert_scheme(
    layers: Sequence[CompressedLayer], all_layers: Sequence[LayerSpec]
) -> tuple[int, int] | None:
    """Return the one scheme of all experts, None if there are none.

    Raises:
        ArtifactError: the experts have several schemes, or some are dense.
    """
    packed = [layer for layer in layers if layer.spec.expert]
    channels = all(layer.scale.shape[1] == 1 for layer in packed)
    # a group as wide as the layer counts as a channel only if that holds for all experts
    found = sorted({(_get_bits(x), 0 if channels else _get_group_size(x)) for x in packed})
    dense = sum(spec.expert for spec in all_layers) - len(packed)
    if len(found) > 1 or dense:
        kinds = [f"{bits} bits in groups of {group or 'a channel'}" for bits, group in found]
        kinds += [f"{dense} dense"] if dense else []
        raise ArtifactError(
            f"the experts have {', '.join(kinds)}; stock transformers loads one scheme for all",
            allowed="the same bits and group size for every expert",
        )
    return found[0] if found else None


def _build_group(key: tuple[int, int], names: list[str]) -> Mapping[str, Any]:
    bits, group_size = key
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    if group_size:
        weights |= {"strategy": "group", "group_size": group_size}
    else:
        weights |= {"strategy": "channel"}
    return {"targets": names, "format": FORMAT, "weights": weights}


COMPRESSED_TENSORS = CompressedTensors()
