"""What the files beside a checkpoint say of its packed layers; nothing where they are damaged.

For `cptq inspect`, which shows what is there: what a file says wrongly is for `cptq verify`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cptq.artifact.formats.compressed_tensors import EXPERTS
from cptq.artifact.manifest import MANIFEST
from cptq.checkpoint.files import UNREADABLE
from cptq.types import is_expert

_DAMAGED = (OSError, *UNREADABLE)


def read_packed_schemes(directory: Path) -> dict[str, tuple[str, tuple[int, int] | None]]:
    """{layer: label and shape} of a packed model, as config.json and the manifest have them.

    The words of a file do not tell how many inputs there are: without a manifest no shape is known.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        modules = config["quantization_config"]["modules"]
        shapes = _read_layer_shapes(directory)
        return {str(name): (str(label), shapes.get(name)) for name, label in modules.items()}
    except _DAMAGED:
        return {}


def _read_layer_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """{layer: (out, in)} as the manifest has them; empty where it says nothing readable."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        rows = {str(item["name"]): item["shape"] for item in manifest["inventory"]}
        return {name: (int(row[0]), int(row[1])) for name, row in rows.items() if min(row) > 0}
    except _DAMAGED:
        return {}


def read_config_schemes(directory: Path, layers: Iterable[str]) -> dict[str, Mapping[str, Any]]:
    """{layer: what config.json says of its weights}; empty where it says nothing readable.

    Experts, of which `layers` are some, are named by an expression (`EXPERTS`).
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        groups = config["quantization_config"]["config_groups"].values()
        said = {str(name): group["weights"] for group in groups for name in group["targets"]}
        experts = said.get(EXPERTS)
        return said if experts is None else said | dict.fromkeys(filter(is_expert, layers), experts)
    except _DAMAGED:
        return {}
