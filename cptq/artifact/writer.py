"""Write an artifact: weights, config, companions, manifest; verify it; then put it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cptq.artifact.card import CARD, model_card
from cptq.artifact.companions import companion_bytes
from cptq.artifact.content import Content, content_of
from cptq.artifact.formats import DEFAULT_FORMAT, FORMATS
from cptq.artifact.formats.interface import Format
from cptq.artifact.manifest import MANIFEST, build_manifest, manifest_bytes
from cptq.artifact.place import check_output, new_directory
from cptq.artifact.verify import Verification, VerificationSample
from cptq.artifact.weights import write_bytes, write_files
from cptq.checkpoint.model import LoadedModel
from cptq.errors import ArtifactError
from cptq.types import (
    Artifact,
    CalibrationRecord,
    CompressedLayer,
    Emit,
    Notice,
    Plan,
    Progress,
)

__all__ = ["VerificationSample", "check_output", "write_artifact"]


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
    form: str = DEFAULT_FORMAT,
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
        form: a name of `FORMATS`.
        emit: receives progress, and what must be said.

    Returns:
        The artifact, its manifest being that of cptq.json.

    Raises:
        OutputExistsError: `out` is there and `overwrite` is not set.
        ArtifactError: a layer the format cannot hold, a full disk, a failed verification. Nothing
            is left behind then, and an older artifact is untouched.
    """
    chosen = FORMATS.get(form)
    content = content_of(model, layers, emit)
    chosen.check(content)
    out = check_output(out, overwrite=overwrite, source=model.path)
    more = dict(extras or {})
    _check_extras(more)
    need = chosen.nbytes(content) + companion_bytes(model.path)
    with new_directory(out, need + sum(map(len, more.values()))) as place:
        emit(Progress(stage="write", done=0, total=2, message=f"{need:,} bytes"))
        written = chosen.write(content, place, emit)
        total = sum(written.files.values())
        card = model_card(content, chosen, plan, calibration, total)
        write_bytes(place / CARD, card.encode())
        write_files(place, more)
        emit(Progress(stage="write", done=1, total=2, message="verifying in a fresh process"))
        verification = _verify(chosen, content, place, sample, emit)
        manifest = build_manifest(
            content,
            plan,
            calibration=calibration,
            seed=seed,
            weight_format=chosen.label(content),
            weight_files=written.files,
            digests=written.digests,
        )
        manifest["verification"] = _plain(verification)
        write_bytes(place / MANIFEST, manifest_bytes(manifest))
        write_files(place, reports(verification) if reports else {})
    emit(Progress(stage="write", done=2, total=2, message=str(out)))
    return Artifact(path=out, weight_bytes=total, format=manifest["format"], manifest=manifest)


def _check_extras(extras: Mapping[str, bytes]) -> None:
    for name in extras:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or path.suffix == ".safetensors":
            raise ArtifactError(f"{name!r} is no name for a file beside the weights")


def _verify(
    form: Format, content: Content, place: Path, sample: VerificationSample | None, emit: Emit
) -> Verification | None:
    if sample is None:
        message = "was not compared with the model in memory, as no sample was given"
        emit(Notice(kind="warning", subject="artifact", message=message))
        return None
    return form.verify(content, place, sample)


def _plain(found: Verification | None) -> dict[str, Any] | None:
    """JSON's words for it, without the seconds: the same run writes the same bytes."""
    if found is None:
        return None
    plain = asdict(found)
    plain.pop("seconds")
    return plain | {key: list(plain[key]) for key in ("missing", "unexpected", "mismatched")}
