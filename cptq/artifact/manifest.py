"""`cptq.json`: what was done, from what, with what, and how the result can be checked.

No times and no dates: the same run writes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cptq import __version__
from cptq.checkpoint.model import LoadedModel
from cptq.types import CalibrationRecord, CompressedLayer, LayerResult, Plan

MANIFEST = "cptq.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "safetensors", "compressed-tensors")


def build_manifest(
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    plan: Plan,
    *,
    calibration: CalibrationRecord,
    seed: int,
    weight_format: str,
    weight_files: Mapping[str, int],
    digests: Mapping[str, str],
) -> dict[str, Any]:
    """Everything but the verification, as plain data."""
    packed = {layer.spec.name for layer in layers}
    return {
        "format_version": FORMAT_VERSION,
        "format": weight_format,
        "versions": _versions(),
        "model": {
            "source": model.source,
            "fingerprint": model.fingerprint,
            "kind": model.kind,
            "family": model.family,
        },
        "seed": seed,
        "plan": plan.to_dict(),
        "calibration": asdict(calibration),
        "layers": [_layer(layer.result) for layer in layers],
        "dense": {
            spec.name: spec.reason or "kept at 16 bits by the plan"
            for spec in model.layers
            if spec.name not in packed
        },
        "weight_files": dict(weight_files),
        "tensors_sha256": dict(digests),
        "verification": None,
    }


def _versions() -> dict[str, str]:
    found = {"cptq": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _layer(result: LayerResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "candidate": result.candidate.label,
        "bits": result.candidate.bits,
        "group_size": result.group_size,
        "nbytes": result.nbytes,
        "weight_error": result.weight_error,
        "output_error": result.output_error,
        "notes": list(result.notes),
    }


def manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is written."""
    return (json.dumps(dict(manifest), indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact; empty where the directory is none, or its file is no JSON."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
