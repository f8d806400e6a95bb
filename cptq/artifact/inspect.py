"""`cptq inspect`: describe a checkpoint or a GGUF file from its headers alone.

No weights are read, so it is fast and needs little memory at any size. Bits per weight of a layer
are all its bytes, including scales and shapes, divided by its number of weights. Damaged settings
files are ignored here; `cptq verify` reports them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

from cptq.artifact.formats.compressed_tensors import EXPERTS
from cptq.artifact.gguf.header import GgufTensor, read_gguf
from cptq.artifact.manifest import ACTIVATIONS, MANIFEST
from cptq.checkpoint.files import UNREADABLE, find_weight_files, open_tensors, read_header
from cptq.errors import ArtifactError, ModelError
from cptq.layouts.activations import PARTS as PARTS_OF_RULES
from cptq.types import ActivationRecord, Budget, Prospect, TensorSpec, is_expert

_DAMAGED = (OSError, *UNREADABLE)
_BLOCK = re.compile(r"\.\d+\.")
_PACKED = ("weight_packed", "weight_scale", "weight_shape")
#: tensors of the packed format; its codes are a `weight` of 32-bit words
_OWN_PARTS = ("weight_zero", "weight_mask", "weight_pattern", *PARTS_OF_RULES)
#: dense types of ggml
FLOATS = ("F64", "F32", "F16", "BF16")
#: parts of a file in the order shown
PARTS = (
    "packed weights",
    "scales and shapes",
    "dense matrices in blocks",
    "embeddings and heads",
    "norms and biases",
    "header, settings, vocabulary",
)


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """One matrix: how it is stored, `shape` (out, in) if known, and bits including scales."""

    name: str
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    bits: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Content of a file: `parts` is {part: (tensors, bytes)}, `provenance` its origin as text.

    `weights` is None if the shape of a packed layer is not known. `prospect`: what `compress` would
    do with it, of a checkpoint that cptq did not write.
    """

    path: Path
    form: str
    nbytes: int
    weights: int | None
    parts: Mapping[str, tuple[int, int]]
    layers: tuple[LayerFacts, ...]
    provenance: Mapping[str, str]
    prospect: Prospect | None = None

    @property
    def bits(self) -> float:
        """Bits of the whole file per weight; NaN if their number is not known."""
        return float("nan") if self.weights is None else 8 * self.nbytes / max(1, self.weights)


def inspect(path: Path) -> Inspection:
    """Inspect a directory, a safetensors file or a GGUF file.

    Raises:
        ArtifactError, ModelError: the path is not one of these, or is damaged.
    """
    path = path.expanduser()
    if path.is_file():
        return (
            _inspect_gguf(path, {})
            if path.suffix == ".gguf"
            else _inspect_safetensors(path, [path])
        )
    if not path.is_dir():
        raise ArtifactError(
            f"{path} does not exist", allowed="a directory, a .safetensors or a .gguf file"
        )
    files, ggufs = find_weight_files(path), sorted(path.glob("*.gguf"))
    if files:
        return _inspect_safetensors(path, files)
    if len(ggufs) == 1:
        return _inspect_gguf(ggufs[0], _read_provenance(path))
    raise ArtifactError(
        f"{path} contains no safetensors and {len(ggufs)} GGUF files",
        allowed="a checkpoint, an artifact, or a directory with one GGUF file",
    )


def _inspect_safetensors(path: Path, files: list[Path]) -> Inspection:
    specs = [spec for file in files for spec in read_header(file).values()]
    size = sum(file.stat().st_size for file in files)
    layers = tuple(_list_layers(specs, _read_shapes(files), path if path.is_dir() else path.parent))
    loose = sum(s.numel for s in specs if not _is_packed(s) and len(s.shape) < 2)
    known = all(isfinite(layer.bits) for layer in layers)
    return Inspection(
        path=path,
        form="safetensors",
        nbytes=size,
        weights=loose + sum(prod(layer.shape) for layer in layers) if known else None,
        parts=_sum_parts(((_normalize_name(s), s.shape, s.nbytes) for s in specs), size),
        layers=layers,
        provenance=_read_provenance(path if path.is_dir() else path.parent),
    )


def _is_packed(spec: TensorSpec) -> bool:
    return spec.name.endswith((*_PACKED, *_OWN_PARTS)) or _is_own(spec)


def _is_own(spec: TensorSpec) -> bool:
    return spec.dtype == "I32" and spec.name.endswith(".weight")


def _normalize_name(spec: TensorSpec) -> str:
    """Return the tensor's name, for codes of the packed format as in compressed-tensors."""
    return f"{spec.name}_packed" if _is_own(spec) else spec.name


def _sum_parts(
    rows: Iterable[tuple[str, tuple[int, ...], int]], size: int
) -> dict[str, tuple[int, int]]:
    found = {part: [0, 0] for part in PARTS}
    for name, shape, nbytes in rows:
        part = found[_find_part(name, shape)]
        part[0], part[1] = part[0] + 1, part[1] + nbytes
    found[PARTS[5]] = [0, size - sum(nbytes for _, nbytes in found.values())]
    return {part: (count, nbytes) for part, (count, nbytes) in found.items() if count or nbytes}


def _find_part(name: str, shape: tuple[int, ...]) -> str:
    if name.endswith("weight_packed"):
        return PARTS[0]
    if name.endswith(("weight_scale", "weight_shape", *_OWN_PARTS)):
        return PARTS[1]
    if len(shape) < 2:
        return PARTS[4]
    return PARTS[2] if _BLOCK.search(name) else PARTS[3]


def _read_shapes(files: list[Path]) -> dict[str, tuple[int, int]]:
    """Read {layer: (out, in)} of packed layers from their shape tensors."""
    found = {}
    for file in files:
        names = [n for n, s in read_header(file).items() if s.name.endswith("weight_shape")]
        with open_tensors(file, "numpy") as stream:
            for name in names:
                values = stream.get_tensor(name).reshape(-1).tolist()
                if len(values) == 2 and all(type(v) is int and 0 < v < 1 << 31 for v in values):
                    found[name.removesuffix(".weight_shape")] = (values[0], values[1])
    return found


def _list_layers(
    specs: list[TensorSpec], shapes: Mapping[str, tuple[int, int]], directory: Path
) -> Iterable[LayerFacts]:
    """Yield every matrix, packed ones as the layers they encode."""
    sizes = {s.name: s for s in specs}
    grids = _read_config_schemes(directory, [name.rpartition(".")[0] for name in sizes])
    own = _read_packed_schemes(directory)
    for spec in specs:
        layer, _, end = spec.name.rpartition(".")
        if layer in own and end == "weight":
            yield _describe_own_packed(layer, specs, *own[layer])
        elif layer in own and end != "bias":
            continue
        elif end == "weight_packed":
            yield _describe_packed(layer, sizes, shapes.get(layer), grids.get(layer, {}))
        elif len(spec.shape) >= 2 and not _is_packed(spec):
            bits = 8 * spec.nbytes / max(1, spec.numel)
            yield LayerFacts(
                name=layer or spec.name,
                stored=spec.dtype,
                shape=spec.shape,
                nbytes=spec.nbytes,
                bits=bits,
            )


def _describe_packed(
    layer: str,
    sizes: Mapping[str, TensorSpec],
    shape: tuple[int, int] | None,
    weights: Mapping[str, Any],
) -> LayerFacts:
    """Describe a layer of compressed-tensors."""
    parts = [sizes[f"{layer}.{end}"] for end in _PACKED if f"{layer}.{end}" in sizes]
    nbytes, group = sum(part.nbytes for part in parts), weights.get("group_size")
    groups = f"groups of {group}" if group else "per channel"
    stored = f"{weights['num_bits']} bits, {groups}" if "num_bits" in weights else "packed"
    bits = 8 * nbytes / prod(shape) if shape else float("nan")
    return LayerFacts(
        name=layer, stored=stored, shape=shape or parts[0].shape, nbytes=nbytes, bits=bits
    )


def _describe_own_packed(
    layer: str, specs: list[TensorSpec], label: str, shape: tuple[int, int] | None
) -> LayerFacts:
    """Describe a layer of the packed format."""
    mine = [s for s in specs if s.name.startswith((f"{layer}.weight", f"{layer}.activation_"))]
    nbytes = sum(spec.nbytes for spec in mine)
    bits = 8 * nbytes / prod(shape) if shape else float("nan")
    return LayerFacts(
        name=layer, stored=label, shape=shape or mine[0].shape, nbytes=nbytes, bits=bits
    )


def _inspect_gguf(path: Path, provenance: Mapping[str, str]) -> Inspection:
    header, size = read_gguf(path), path.stat().st_size
    words = {
        key.rpartition(".")[2] if key.startswith("general.") else key: str(value)
        for key, value in header.metadata.items()
        if key.startswith(("general.", "cptq.")) and isinstance(value, str | int | float)
    }
    layers = tuple(
        LayerFacts(
            name=tensor.name.removesuffix(".weight"),
            stored=tensor.kind,
            shape=tensor.shape,
            nbytes=tensor.nbytes,
            bits=8 * tensor.nbytes / tensor.numel,
        )
        for tensor in header.tensors
        if len(tensor.shape) > 1
    )
    return Inspection(
        path=path,
        form=f"GGUF, version {header.version}",
        nbytes=size,
        weights=sum(tensor.numel for tensor in header.tensors),
        parts=_sum_parts(
            ((_normalize_gguf_name(t), t.shape, t.nbytes) for t in header.tensors), size
        ),
        layers=layers,
        provenance={**words, **provenance},
    )


def _normalize_gguf_name(tensor: GgufTensor) -> str:
    """Return the tensor's name, for quantized ones as in compressed-tensors."""
    return tensor.name if tensor.kind in FLOATS else f"{tensor.name}_packed"


def _read_provenance(directory: Path) -> dict[str, str]:
    """Read the provenance from cptq.json; empty if there is none."""
    from cptq.artifact.reader import read_manifest

    if not (directory / MANIFEST).is_file():
        return {}
    manifest = read_manifest(directory)
    try:
        return _describe_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ModelError(f"{directory / MANIFEST} is damaged ({error!r})") from error


def _describe_manifest(manifest: Mapping[str, Any]) -> dict[str, str]:
    model, plan, text = manifest["model"], manifest["plan"], manifest["calibration"]
    budget = Budget.from_dict(plan["budget"])
    return {
        "base model": f"{model['source']} (sha256 {str(model['fingerprint'])[:16]})",
        "format": str(manifest["format"]),
        "target": f"{budget.asked}, at most {budget.limit_text}",
        "plan": f"{plan['allocator']}"
        + (f" with {plan['metric']} scores" if plan["metric"] else ""),
        "calibration": f"{text['source']}, {text['samples']} samples, {text['tokens']} tokens",
        **_describe_activations(manifest),
        "seed": str(manifest["seed"]),
        "written by": ", ".join(f"{n} {v}" for n, v in manifest["versions"].items()),
    }


def _describe_activations(manifest: Mapping[str, Any]) -> dict[str, str]:
    if ACTIVATIONS not in manifest:
        return {}
    found = ActivationRecord.from_dict(manifest[ACTIVATIONS])
    words = (
        f"{found.label}, {found.mean:.1%} of the products of {len(found.reached)} linears dropped"
    )
    return {"activation sparsity": f"{words} on {found.tokens:,} calibration tokens"}


def _read_packed_schemes(directory: Path) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """Return {layer: (label, shape)} of a packed model; empty if its files are damaged.

    config.json has the labels and the manifest the shapes; without a manifest they are None.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        modules = config["quantization_config"]["modules"]
        shapes = _read_layer_shapes(directory)
        return {str(name): (str(label), shapes.get(name)) for name, label in modules.items()}
    except _DAMAGED:
        return {}


def _read_layer_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Return {layer: (out, in)} of the manifest; empty if it is missing or damaged."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        rows = {str(item["name"]): item["shape"] for item in manifest["inventory"]}
        return {name: (int(row[0]), int(row[1])) for name, row in rows.items() if min(row) > 0}
    except _DAMAGED:
        return {}


def _read_config_schemes(directory: Path, layers: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """Return {layer: its weights entry in config.json}; empty if the file is damaged.

    Experts among `layers` have the entry of the expression `EXPERTS`.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        groups = config["quantization_config"]["config_groups"].values()
        entries = {str(name): group["weights"] for group in groups for name in group["targets"]}
        if EXPERTS in entries:
            entries |= dict.fromkeys(filter(is_expert, layers), entries[EXPERTS])
        return entries
    except _DAMAGED:
        return {}
