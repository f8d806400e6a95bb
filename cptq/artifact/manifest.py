"""The manifest `cptq.json`: source, plan, versions, results per layer, and digests for checking.

It contains no times or dates, so the same run writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cptq import __version__
from cptq.artifact.content import Content
from cptq.types import CalibrationRecord, LayerResult, Plan

MANIFEST = "cptq.json"
FORMAT_VERSION = 1
#: the field of an artifact with activation sparsity
ACTIVATIONS = "activation_sparsity"
#: the field of an artifact that was tuned
TUNED = "tuned"
#: suffixes of the other files that a loader reads
LOADED = (".json", ".jinja", ".model", ".txt", ".py", ".tiktoken")
_PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors")


def build_manifest(
    model: Content,
    plan: Plan,
    *,
    calibration: CalibrationRecord,
    seed: int,
    form: str,
    weight_format: str,
    weight_files: Mapping[str, int],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Build the manifest as plain data, without the fields that verification adds.

    `form` is the name of the format in `FORMATS`, `weight_format` its name for readers.
    """
    packed = {layer.spec.name: layer for layer in model.compressed.values()}
    return {
        "format_version": FORMAT_VERSION,
        "form": form,
        "format": weight_format,
        "versions": _list_versions(),
        "model": {
            "source": model.base_name,
            "hub_id": model.hub_id,
            "fingerprint": model.fingerprint,
            "kind": model.kind,
            "family": model.family,
        },
        "seed": seed,
        "plan": plan.to_dict(),
        "calibration": asdict(calibration),
        "layers": [_record_layer(layer.result) for layer in packed.values()],
        "dense": {
            spec.name: spec.reason or "kept at 16 bits by the plan"
            for spec in model.layers
            if spec.name not in packed
        },
        "inventory": [asdict(spec) for spec in model.layers],
        "weight_files": dict(weight_files),
        "tensors_sha256": dict(digests),
        "files_sha256": {},
        "verification": None,
        **({} if model.activations is None else {ACTIVATIONS: model.activations.to_dict()}),
    }


def _list_versions() -> dict[str, str]:
    found = {"cptq": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _record_layer(result: LayerResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "candidate": result.candidate.label,
        "bits": result.candidate.bits,
        "group_size": result.group_size,
        "nbytes": result.nbytes,
        "weight_error": result.weight_error,
        "output_error": result.output_error,
        "held_out": result.held_out,
        "notes": list(result.notes),
    }


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Encode the manifest as JSON."""
    return (json.dumps(dict(manifest), indent=1, ensure_ascii=False) + "\n").encode()


def compute_file_digests(place: Path, weight_files: Iterable[str]) -> dict[str, str]:
    """Return the sha256 (hex) of settings, tokenizer and code: the loaded files except weights."""
    weights = set(weight_files)
    found = {}
    for path in sorted(place.rglob("*")):
        name = path.relative_to(place).as_posix()
        if path.is_file() and name not in weights and path.suffix in LOADED:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def try_read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of an artifact; empty if there is none or it is not a JSON object."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
