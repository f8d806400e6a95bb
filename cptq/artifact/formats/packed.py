"""`packed`: cptq's own format for what compressed-tensors cannot hold (docs/format-packed.md).

It holds asymmetric grids, Conv1D, embeddings, output heads and sparse weights. transformers loads
it after `import cptq` and computes from the packed weights. Without cptq, loading must fail: stock
transformers (5.x) would fill in random numbers with only a warning. Two measures ensure that:
the weight file has its own name, so none is found (an OSError); and the codes have the name of the
dense weight but another shape, which is an error even after transformers has saved the model again
under the usual file name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cptq.artifact.content import Content
from cptq.artifact.formats.interface import SafetensorsFormat
from cptq.checkpoint.files import read_config
from cptq.checkpoint.loader import choose_auto_class
from cptq.checkpoint.weights import (
    TORCH_DTYPES,
    get_dtype_name,
    get_scale_dtype,
    get_scale_dtypes,
    get_storage_dtype,
)
from cptq.errors import ArtifactError
from cptq.layouts.activations import PARTS, list_rule_tensors
from cptq.layouts.packed import (
    METHOD,
    NEEDS,
    PACKED_LAYOUT,
    ROW_BITS,
    RULES_VERSION,
    STEM,
    WEIGHT_FILES,
    count_pattern_bits,
    count_stored,
    find_version,
    list_packed_tensors,
    resolve_candidate,
)
from cptq.layouts.safetensors_header import split_shards
from cptq.numerics.levels import Spacing, to_codes, to_levels
from cptq.numerics.packing import pack_rows, pack_values, unpack_rows, unpack_values
from cptq.numerics.scale_grids import join_rows, split_rows
from cptq.numerics.sparse import gather_codes, join_n_of_m, scatter_codes, split_n_of_m
from cptq.types import Candidate, CompressedLayer, LayerResult, LayerSpec, TensorSpec


class Packed(SafetensorsFormat):
    """The format described at the top of this module."""

    name = "packed"
    layout = PACKED_LAYOUT
    tags = ("cptq-packed",)
    imports = ("cptq",)
    stem = STEM
    holds_rules = True

    def check_layer(self, layer: CompressedLayer) -> None:
        check_layer(layer)

    def list_layer_tensors(self, layer: CompressedLayer) -> tuple[TensorSpec, ...]:
        spec, scheme = layer.spec, get_scheme(layer)
        stored = spec.scale_dtype if scheme.scales else get_dtype_name(layer.scale.dtype)
        label = "" if layer.rule is None else layer.rule.label
        ruled = list_rule_tensors(spec.name, spec.shape, label)
        return (*list_packed_tensors(spec.name, spec.shape, stored, scheme), *ruled)

    def pack_layer_tensor(self, layer: CompressedLayer, spec: TensorSpec) -> Tensor:
        part = spec.name.rpartition(".")[2]
        if part in PARTS and layer.rule is not None:
            return layer.rule.tensors[part].to(TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
        return _PACKERS[part](layer)

    def read_layer(
        self, spec: LayerSpec, result: LayerResult, get: Callable[[str], Tensor]
    ) -> CompressedLayer:
        grid = resolve_candidate(result.candidate, spec.shape[1])
        tensors = {part.name.rpartition(".")[2]: part for part in PACKED_LAYOUT.tensors(spec, grid)}
        values = {part: get(tensor.name) for part, tensor in tensors.items()}
        for part, value in values.items():
            packed = tensors[part].dtype == "I32"
            known = (torch.int32,) if packed else (get_scale_dtype(spec), get_storage_dtype(spec))
            if tuple(value.shape) != tensors[part].shape or value.dtype not in known:
                raise ArtifactError(f"{tensors[part].name} does not match the manifest")
        layer = _unpack_layer(spec, result, grid, values)
        check_layer(layer)
        return layer

    def build_quantization_config(self, content: Content) -> dict[str, Any] | None:
        layers = content.compressed.values()
        if not layers:
            return None
        shards = split_shards(self._list_tensors(content), content.shard_bytes)
        version = max(find_version(get_scheme(layer)) for layer in layers)
        rules = {layer.spec.name: layer.rule.label for layer in layers if layer.rule is not None}
        ruled: dict[str, Any] = {}
        if content.activations is not None and rules:
            found = content.activations
            ruled = {"method": found.method, "share": found.share, "rules": rules}
        return {
            "quant_method": METHOD,
            "format_version": max(version, RULES_VERSION) if ruled else version,
            "needs": NEEDS,
            "weights": WEIGHT_FILES[len(shards) > 1],
            "modules": {layer.spec.name: get_scheme(layer).label for layer in layers},
            **({"activations": ruled} if ruled else {}),
        }

    def describe_loading(self, content: Content) -> Sequence[str]:
        auto = choose_auto_class(read_config(content.path), content.kind)
        return [
            "**This model needs cptq** (`pip install cptq`): its weights are stored in cptq's own "
            "packed format, which no other program reads.",
            "",
            "```python",
            "import cptq  # registers the packed format with transformers",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("PATH")  # or: model = cptq.load("PATH")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            "```",
            "",
            "The weights stay packed in memory and are unpacked tile by tile during computation.",
            "",
        ]


def get_scheme(layer: CompressedLayer) -> Candidate:
    """Return the candidate with the group size that was used, and the scales that are stored."""
    return resolve_candidate(layer.result.candidate, layer.spec.shape[1])


def check_layer(layer: CompressedLayer) -> None:
    """Refuse a layer that the format cannot hold or whose parts are inconsistent.

    Raises:
        ArtifactError: names the layer and the reason.
    """
    spec, name, grid = layer.spec, layer.spec.name, get_scheme(layer)
    why = PACKED_LAYOUT.explain_refusal(spec, grid)
    if why is not None:
        raise ArtifactError(f"{name} cannot be packed as {grid.label}: {why}")
    places = (spec.shape[0], spec.shape[1] // (grid.group_size or spec.shape[1]))
    _check_part(name, "codes", layer.codes, spec.shape, torch.int8)
    _check_part(name, "scales", layer.scale, places, *get_scale_dtypes(spec, grid))
    if not grid.symmetric:
        _check_part(name, "zero points", layer.zero, places, torch.int8)
    if grid.sparsity:
        _check_part(name, "a mask", layer.mask, spec.shape, torch.bool)
    if (layer.zero is not None and grid.symmetric) or (layer.mask is not None) != (
        grid.sparsity > 0
    ):
        raise ArtifactError(f"{name} has zero points or a mask that do not belong to {grid.label}")
    if not bool((torch.isfinite(layer.scale) & (layer.scale != 0)).all()):
        raise ArtifactError(f"{name} has a scale that is 0, infinite or not a number")
    if layer.mask is not None:
        _check_mask(name, layer.mask, spec.shape, grid)


def _check_part(
    name: str, what: str, value: Tensor | None, shape: tuple[int, int], *dtypes: torch.dtype
) -> None:
    if value is None or tuple(value.shape) != shape or value.dtype not in dtypes:
        actual = "none" if value is None else f"{value.dtype} {tuple(value.shape)}"
        raise ArtifactError(f"{name} needs {what} {dtypes[0]} {shape}, not {actual}")


def _check_mask(name: str, mask_OI: Tensor, shape: tuple[int, int], grid: Candidate) -> None:
    if grid.kept_of:
        kept, of = grid.kept_of
        if not bool((mask_OI.view(-1, of).sum(1) == kept).all()):
            raise ArtifactError(f"{name} does not keep exactly {kept} of every {of} weights")
    elif int(mask_OI.sum()) != count_stored(shape, grid):
        raise ArtifactError(
            f"{name} keeps {int(mask_OI.sum()):,} weights, but {grid.label} stores "
            f"{count_stored(shape, grid):,}"
        )


def _pack_codes(layer: CompressedLayer) -> Tensor:
    bits, grid = layer.result.candidate.bits, get_scheme(layer)
    if layer.mask is None:
        return pack_rows(_find_codes(layer, grid), bits)
    if grid.kept_of:
        return pack_rows(split_n_of_m(layer.codes, layer.mask, *grid.kept_of)[1], bits)
    return pack_rows(gather_codes(layer.codes, layer.mask).unsqueeze(0), bits)[0]


def _find_codes(layer: CompressedLayer, grid: Candidate) -> Tensor:
    """Return the codes of a weight that has all of them."""
    try:
        return to_codes(layer.codes, Spacing(grid.bits, grid.levels))
    except ValueError as error:
        raise ArtifactError(f"{layer.spec.name}: {error}") from error


def _pack_zero(layer: CompressedLayer) -> Tensor:
    assert layer.zero is not None
    return pack_rows(layer.zero, layer.result.candidate.bits)


def _pack_mask(layer: CompressedLayer) -> Tensor:
    assert layer.mask is not None
    return pack_values(layer.mask, 1)


def _pack_pattern(layer: CompressedLayer) -> Tensor:
    kept_of = layer.result.candidate.kept_of
    assert layer.mask is not None
    assert kept_of is not None
    pattern_OB, _ = split_n_of_m(layer.codes, layer.mask, *kept_of)
    return pack_values(pattern_OB, count_pattern_bits(*kept_of))


def _pack_scale(layer: CompressedLayer) -> Tensor:
    if not get_scheme(layer).scales:
        return layer.scale
    return pack_rows(_split_scales(layer)[0], ROW_BITS)


def _split_scales(layer: CompressedLayer) -> tuple[Tensor, Tensor]:
    """Return codes and factors of `row` scales."""
    try:
        return split_rows(layer.scale, get_scale_dtype(layer.spec))
    except ValueError as error:
        raise ArtifactError(f"{layer.spec.name}: {error}") from error


_PACKERS: dict[str, Callable[[CompressedLayer], Tensor]] = {
    "weight": _pack_codes,
    "weight_scale": _pack_scale,
    "weight_factor": lambda layer: _split_scales(layer)[1],
    "weight_zero": _pack_zero,
    "weight_mask": _pack_mask,
    "weight_pattern": _pack_pattern,
}


def _unpack_layer(
    spec: LayerSpec, result: LayerResult, grid: Candidate, values: dict[str, Tensor]
) -> CompressedLayer:
    """Unpack the tensors of a layer, the inverse of `_PACKERS`."""
    inputs, scale = spec.shape[1], values["weight_scale"]
    if grid.scales:
        groups = inputs // (grid.group_size or inputs)
        scale = join_rows(unpack_rows(scale, ROW_BITS, groups), values["weight_factor"])
    zero = values.get("weight_zero")
    codes, mask = _unpack_sparse_codes(spec, grid, values)
    if codes is None:
        stored = unpack_rows(values["weight"], grid.bits, inputs)
        codes = to_levels(stored, Spacing(grid.bits, grid.levels))
    return CompressedLayer(
        spec=spec,
        result=result,
        codes=codes,
        scale=scale,
        zero=None if zero is None else unpack_rows(zero, grid.bits, scale.shape[1]),
        mask=mask,
    )


def _unpack_sparse_codes(
    spec: LayerSpec, grid: Candidate, values: dict[str, Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    """Return codes and mask of a sparse weight; (None, None) for others."""
    inputs = spec.shape[1]
    try:
        if grid.kept_of:
            kept, of = grid.kept_of
            bits, blocks = count_pattern_bits(kept, of), inputs // of
            pattern = unpack_values(values["weight_pattern"], bits, blocks)
            stored = unpack_rows(values["weight"], grid.bits, blocks * kept)
            return join_n_of_m(pattern, stored, kept, of)
        if grid.sparsity:
            mask = unpack_values(values["weight_mask"], 1, inputs).bool()
            count = count_stored(spec.shape, grid)
            stored = unpack_rows(values["weight"].unsqueeze(0), grid.bits, count)[0]
            return scatter_codes(stored, mask), mask
    except ValueError as error:
        raise ArtifactError(f"{spec.name} does not match the manifest: {error}") from error
    return None, None


PACKED = Packed()
