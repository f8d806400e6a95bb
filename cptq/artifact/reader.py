"""Read an artifact from disk: manifest, layers as integers, dense tensors one at a time.

Its content is not trusted: the tensors of the weight files must match the layers of the manifest in
type and shape before any of them is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cptq.artifact.content import Content
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.interface import Format, SafetensorsFormat
from cptq.artifact.manifest import ACTIVATIONS, FORMAT_VERSION, MANIFEST
from cptq.artifact.reload import ReloadSample
from cptq.artifact.sample import read_sample
from cptq.checkpoint.files import find_weight_files, open_tensors, read_header
from cptq.checkpoint.loader import AUTO_CLASSES
from cptq.errors import ArtifactError
from cptq.layouts import Layout
from cptq.layouts.activations import RuledLayout, list_rule_tensors
from cptq.types import (
    ActivationRecord,
    ActivationRule,
    CalibrationRecord,
    Candidate,
    LayerResult,
    LayerSpec,
    Plan,
    TensorSpec,
)

#: more inputs than any layer has; larger claims in a manifest are refused
MOST_INPUTS = 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredArtifact:
    """An artifact's validated manifest and its content."""

    path: Path
    manifest: Mapping[str, Any]
    form: Format
    content: Content
    plan: Plan
    calibration: CalibrationRecord
    seed: int
    sample: ReloadSample | None


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read cptq.json as plain data, in the format version of this cptq.

    Raises:
        ArtifactError: it is missing, not a JSON object, or has another format version.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{directory} has no {MANIFEST}, so it is not an artifact of cptq",
            allowed="a directory that cptq compress or cptq export wrote",
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has version {version!r}; this cptq reads {FORMAT_VERSION}",
            hint="read it with the cptq that wrote it, or compress the model again",
        )
    found: dict[str, Any] = manifest
    return found


def find_format(manifest: Mapping[str, Any]) -> Format:
    """Return the format that a manifest names.

    Raises:
        UnknownNameError: this cptq does not have it.
    """
    return FORMATS.get(str(manifest.get("form")))


def open_artifact(directory: Path, *, trust_remote_code: bool = False) -> StoredArtifact:
    """Read an artifact back.

    Raises:
        ArtifactError: it is not an artifact, is damaged, or has a format that cannot be read.
        ModelError: a weight file is truncated, corrupt or hostile.
    """
    directory = directory.expanduser()
    manifest = read_manifest(directory)
    form = find_format(manifest)
    if not isinstance(form, SafetensorsFormat):
        raise ArtifactError(
            f"{directory} has the format {form.name}, which cannot be read back",
            hint="export the artifact that it was made from",
        )
    try:
        plan = Plan.from_dict(manifest["plan"])
        calibration = _parse_calibration(manifest["calibration"])
        content = _read_content(directory, manifest, form)
        seed, sample = int(manifest["seed"]), manifest["sample"]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ArtifactError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error})",
            hint="copy the artifact again",
        ) from error
    return StoredArtifact(
        path=directory,
        manifest=manifest,
        form=form,
        content=content,
        plan=plan,
        calibration=calibration,
        seed=seed,
        sample=sample and read_sample(sample, trust_remote_code=trust_remote_code),
    )


def _parse_calibration(data: Mapping[str, Any]) -> CalibrationRecord:
    return CalibrationRecord(**{**data, "notes": tuple(data.get("notes", ()))})


def _read_content(directory: Path, manifest: Mapping[str, Any], form: SafetensorsFormat) -> Content:
    places = {name: path for path in find_weight_files(directory) for name in read_header(path)}
    stored = {
        s.name: s for path in dict.fromkeys(places.values()) for s in read_header(path).values()
    }
    inventory = {item["name"]: _parse_spec(item) for item in manifest["inventory"]}
    results = {item["name"]: _parse_result(item) for item in manifest["layers"]}
    record = None
    if ACTIVATIONS in manifest:
        record = ActivationRecord.from_dict(manifest[ACTIVATIONS])
    rules = {} if record is None else record.rules
    layout = RuledLayout(form.layout, rules)
    parts = {n: _check_tensors(form, layout, inventory[n], r, stored) for n, r in results.items()}
    get = _make_getter(places)
    model = manifest["model"]
    if model["kind"] not in AUTO_CLASSES:
        raise ValueError(f"a model of kind {model['kind']!r}")
    layers = {
        inventory[n].weight_name: replace(
            form.read_layer(inventory[n], r, get), rule=_read_rule(inventory[n], rules.get(n), get)
        )
        for n, r in results.items()
    }
    return Content(
        source=str(model["source"]),
        path=directory,
        kind=model["kind"],
        family=str(model["family"]),
        fingerprint=str(model["fingerprint"]),
        tensors=_view_as_dense(stored, parts, inventory),
        layers=tuple(inventory.values()),
        compressed=layers,
        fetch=lambda name: get(name) if name in places else None,
        hub_id=None if model.get("hub_id") is None else str(model["hub_id"]),
        activations=record,
    )


def _read_rule(
    spec: LayerSpec, label: str | None, get: Callable[[str], Tensor]
) -> ActivationRule | None:
    if label is None:
        return None
    parts = list_rule_tensors(spec.name, spec.shape, label)
    tensors = {part.name.rpartition(".")[2]: get(part.name) for part in parts}
    return ActivationRule(label=label, tensors=tensors)


def _parse_spec(item: Mapping[str, Any]) -> LayerSpec:
    out, inputs = (int(n) for n in item["shape"])
    if min(out, inputs) < 1 or inputs > MOST_INPUTS:
        raise ValueError(f"{item.get('name')} has the shape {out} x {inputs}")
    return LayerSpec(**{**item, "shape": (out, inputs)})


def _parse_result(item: Mapping[str, Any]) -> LayerResult:
    return LayerResult(
        name=str(item["name"]),
        candidate=Candidate.parse(item["candidate"]),
        group_size=int(item["group_size"]),
        nbytes=int(item["nbytes"]),
        weight_error=float(item["weight_error"]),
        output_error=None if item["output_error"] is None else float(item["output_error"]),
        seconds=0.0,
        held_out=bool(item.get("held_out", False)),
        notes=tuple(map(str, item["notes"])),
    )


def _check_tensors(
    form: SafetensorsFormat,
    layout: Layout,
    spec: LayerSpec,
    result: LayerResult,
    stored: Mapping[str, TensorSpec],
) -> tuple[TensorSpec, ...]:
    """Return the tensors of a layer after checking that the files hold them as specified."""
    why = form.layout.explain_refusal(spec, result.candidate)
    if why is not None:
        raise ArtifactError(f"{spec.name} cannot be {result.candidate.label} in {form.name}: {why}")
    parts = layout.tensors(spec, result.candidate)
    for part in parts:
        if stored.get(part.name) != part:
            raise ArtifactError(
                f"the weight files do not contain {part.name} as {part.dtype} {part.shape}, as the "
                "manifest requires",
                hint="copy the artifact again",
            )
    return parts


def _view_as_dense(
    stored: Mapping[str, TensorSpec],
    parts: Mapping[str, tuple[TensorSpec, ...]],
    inventory: Mapping[str, LayerSpec],
) -> tuple[TensorSpec, ...]:
    """List the tensors of a dense artifact, each weight in place of its first part."""
    owner = {part.name: name for name, found in parts.items() for part in found}
    view: dict[str, TensorSpec] = {}
    for name, spec in stored.items():
        layer = inventory.get(owner.get(name, ""))
        if layer is None:
            view[name] = spec
        else:
            shape = layer.shape[::-1] if layer.transposed else layer.shape
            weight = TensorSpec(name=layer.weight_name, dtype=layer.dtype, shape=shape)
            view.setdefault(weight.name, weight)
    return tuple(view.values())


def _make_getter(places: Mapping[str, Path]) -> Callable[[str], Tensor]:
    """Return a function that gets a tensor by name; each file is opened once and mapped."""
    stack, opened = ExitStack(), dict[Path, Any]()

    def get(name: str) -> Tensor:
        path = places[name]
        if path not in opened:
            opened[path] = stack.enter_context(open_tensors(path, "pt"))
        value: Tensor = opened[path].get_tensor(name)
        return value

    return get
