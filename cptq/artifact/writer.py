"""Write an artifact: weights, config, companions, manifest; verify it; then put it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cptq.artifact.card import CARD, model_card
from cptq.artifact.companions import companion_bytes, copy_companions, write_config
from cptq.artifact.formats import compressed_tensors as packed_format
from cptq.artifact.manifest import MANIFEST, build_manifest, manifest_bytes
from cptq.artifact.place import check_output, new_directory
from cptq.artifact.verify import Verification, VerificationSample, verify_in_fresh_process
from cptq.artifact.weights import tensor_digests, write_bytes, write_files, write_weights
from cptq.checkpoint.model import LoadedModel
from cptq.checkpoint.weights import TORCH_DTYPES
from cptq.errors import ArtifactError
from cptq.numerics.layout import replace_tensors
from cptq.numerics.safetensors_header import measure, total_bytes
from cptq.types import (
    Artifact,
    CalibrationRecord,
    CompressedLayer,
    Emit,
    Notice,
    Plan,
    Progress,
    TensorSpec,
)

__all__ = ["VerificationSample", "check_output", "write_artifact"]

#: run types that hold every value of a storage type
_HOLDS = {
    torch.float64: ("F64", "F32", "F16", "BF16"),
    torch.float32: ("F32", "F16", "BF16"),
    torch.float16: ("F16",),
    torch.bfloat16: ("BF16",),
}


def write_artifact(
    model: LoadedModel,
    layers: Sequence[CompressedLayer],
    plan: Plan,
    *,
    calibration: CalibrationRecord,
    out: Path,
    overwrite: bool,
    seed: int,
    sample: VerificationSample | None,
    extras: Mapping[str, bytes] | None = None,
    reports: Callable[[Verification | None], Mapping[str, bytes]] | None = None,
    emit: Emit,
) -> Artifact:
    """Write a directory that stock transformers loads.

    Args:
        model: the model in memory; its dense tensors are written in their storage types.
        layers: the compressed linears; none at all writes a dense copy.
        plan: what was asked for; goes into the manifest.
        calibration: likewise.
        out: the directory to be.
        overwrite: an older artifact there may be replaced, once the new one is verified.
        seed: of the run.
        sample: what to verify with; None leaves that out, and says so.
        extras: {relative path: content} of more files.
        reports: more of them, made when it is known what the verification found.
        emit: receives progress, and what must be said.

    Returns:
        The artifact, its manifest being that of cptq.json.

    Raises:
        OutputExistsError: `out` is there and `overwrite` is not set.
        ArtifactError: a layer the format cannot hold, a full disk, a failed verification. Nothing
            is left behind then, and an older artifact is untouched.
    """
    specs = _file_specs(model, layers)
    out = check_output(out, overwrite=overwrite, source=model.path)
    more = dict(extras or {})
    _check_extras(more)
    need = total_bytes(map(measure, specs)) + companion_bytes(model.path)
    with new_directory(out, need + sum(map(len, more.values()))) as place:
        emit(Progress(stage="write", done=0, total=2, message=f"{need:,} bytes"))
        files = write_weights(place, specs, _Values(model, layers, emit))
        quantization = packed_format.quantization_config(layers, model.layers)
        write_config(model, quantization, place)
        copy_companions(model, place, emit)
        card = model_card(model, layers, plan, calibration, sum(files.values()))
        write_bytes(place / CARD, card.encode())
        write_files(place, more)
        emit(Progress(stage="write", done=1, total=2, message="verifying in a fresh process"))
        verification = _verify(place, model, sample, emit)
        manifest = build_manifest(
            model,
            layers,
            plan,
            calibration=calibration,
            seed=seed,
            weight_format=_format_name(layers),
            weight_files=files,
            digests=tensor_digests(place / name for name in files),
        )
        manifest["verification"] = _plain(verification)
        write_bytes(place / MANIFEST, manifest_bytes(manifest))
        write_files(place, reports(verification) if reports else {})
    emit(Progress(stage="write", done=2, total=2, message=str(out)))
    return Artifact(
        path=out, weight_bytes=sum(files.values()), format=manifest["format"], manifest=manifest
    )


def _format_name(layers: Sequence[CompressedLayer]) -> str:
    return f"{packed_format.NAME} {packed_format.FORMAT}" if layers else packed_format.DENSE


def _file_specs(model: LoadedModel, layers: Sequence[CompressedLayer]) -> list[TensorSpec]:
    """All tensors that will be written, compressed weights replaced in place."""
    if model.quantized:
        raise ArtifactError(
            f"{model.source} is already compressed", hint="compress the model it was made from"
        )
    known = {spec.name for spec in model.tensors}
    packed: dict[str, tuple[TensorSpec, ...]] = {}
    for layer in layers:
        packed_format.check_layer(layer)
        name = layer.spec.weight_name
        if name not in known or name in packed:
            raise ArtifactError(f"{name} is {'twice' if name in packed else 'not'} in the model")
        packed[name] = packed_format.layer_specs(layer)
    return replace_tensors(model.tensors, packed)


def _check_extras(extras: Mapping[str, bytes]) -> None:
    for name in extras:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or path.suffix == ".safetensors":
            raise ArtifactError(f"{name!r} is no name for a file beside the weights")


class _Values:
    """The value of each tensor of the file, made when it is asked for."""

    def __init__(self, model: LoadedModel, layers: Sequence[CompressedLayer], emit: Emit) -> None:
        self._dense = model.module.state_dict()
        self._packed = {spec.name: x for x in layers for spec in packed_format.layer_specs(x)}
        self._report_rounded(model, emit)

    def __call__(self, spec: TensorSpec) -> Tensor:
        layer = self._packed.get(spec.name)
        if layer is not None:
            return packed_format.layer_value(layer, spec)
        if spec.name not in self._dense:
            raise ArtifactError(f"{spec.name} is in the checkpoint and not in the loaded model")
        value = self._dense[spec.name]
        assert isinstance(value, Tensor)
        return value.to(TORCH_DTYPES[spec.dtype])

    def _report_rounded(self, model: LoadedModel, emit: Emit) -> None:
        """Dense values that the type in which the model ran has rounded."""
        rounded = [
            spec.name
            for spec in model.tensors
            if spec.name in self._dense
            and spec.dtype not in _HOLDS.get(self._dense[spec.name].dtype, (spec.dtype,))
        ]
        if rounded:
            message = (
                f"{len(rounded)} tensors ran in a narrower type than they are stored in and are "
                "written rounded; run in float32 (--dtype float32) to keep them exact"
            )
            emit(Notice(kind="warning", subject=rounded[0], message=message))


def _verify(
    place: Path, model: LoadedModel, sample: VerificationSample | None, emit: Emit
) -> Verification | None:
    if sample is None:
        message = "was not compared with the model in memory, as no sample was given"
        emit(Notice(kind="warning", subject="artifact", message=message))
        return None
    return verify_in_fresh_process(
        place,
        model.kind,
        sample.inputs,
        sample.expected,
        tolerance=sample.tolerance,
        attention=sample.attention or getattr(model.config, "_attn_implementation", None),
        trust_remote_code=sample.trust_remote_code,
    )


def _plain(found: Verification | None) -> dict[str, Any] | None:
    """JSON's words for it, without the seconds: the same run writes the same bytes."""
    if found is None:
        return None
    plain = asdict(found)
    plain.pop("seconds")
    return plain | {key: list(plain[key]) for key in ("missing", "unexpected", "mismatched")}
