"""Write an artifact: weights, config, companions, manifest; verify it; then put it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cptq.artifact.card import CARD, build_card
from cptq.artifact.companions import count_companion_bytes
from cptq.artifact.content import Content, build_content
from cptq.artifact.formats import DEFAULT_FORMAT, FORMATS
from cptq.artifact.formats.interface import Format
from cptq.artifact.manifest import MANIFEST, build_manifest, compute_file_digests, encode_manifest
from cptq.artifact.place import check_output, new_directory
from cptq.artifact.sample import record_sample
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
    content = build_content(model, layers, emit)
    record = Record(plan=plan, calibration=calibration, seed=seed)
    return write_content(
        content,
        record,
        form=form,
        out=check_output(out, overwrite=overwrite, source=model.path),
        sample=sample,
        extras=extras,
        reports=reports,
        emit=emit,
    )


@dataclass(frozen=True, kw_only=True)
class Record:
    """How the content came to be; `more` goes into the manifest as it is."""

    plan: Plan
    calibration: CalibrationRecord
    seed: int
    more: Mapping[str, Any] = field(default_factory=dict)


def write_content(
    content: Content,
    record: Record,
    *,
    form: str,
    out: Path,
    sample: VerificationSample | None,
    extras: Mapping[str, bytes] | None = None,
    reports: Callable[[Verification | None], Mapping[str, bytes]] | None = None,
    emit: Emit,
) -> Artifact:
    """As `write_artifact`, of anything; `out` has passed `check_output`."""
    chosen = FORMATS.get(form)
    chosen.check(content)
    more = dict(extras or {})
    _check_extras(more)
    need = chosen.estimate_bytes(content) + count_companion_bytes(content.path)
    with new_directory(out, need + sum(map(len, more.values()))) as place:
        emit(Progress(stage="write", done=0, total=2, message=f"{need:,} bytes"))
        files = chosen.write(content, place, emit)
        total = sum(files.values())
        card = build_card(content, chosen, record.plan, record.calibration, total)
        write_bytes(place / CARD, card.encode())
        write_files(place, more)
        emit(Progress(stage="write", done=1, total=2, message="verifying in a fresh process"))
        verification = _verify(chosen, content, place, sample, emit)
        manifest = _manifest(chosen, content, record, files, place)
        manifest["verification"] = _plain(verification)
        manifest.setdefault("sample", sample and record_sample(_with_attention(sample, content)))
        write_bytes(place / MANIFEST, encode_manifest(manifest))
        write_files(place, reports(verification) if reports else {})
    emit(Progress(stage="write", done=2, total=2, message=str(out)))
    return Artifact(path=out, weight_bytes=total, format=manifest["format"], manifest=manifest)


def _manifest(
    form: Format, content: Content, record: Record, files: Mapping[str, int], place: Path
) -> dict[str, Any]:
    manifest = build_manifest(
        content,
        record.plan,
        calibration=record.calibration,
        seed=record.seed,
        form=form.name,
        weight_format=form.label(content),
        weight_files=files,
        digests=form.compute_digests(place, files),
    )
    manifest["files_sha256"] = compute_file_digests(place, files)
    return manifest | dict(record.more)


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
    sample = _with_attention(sample, content)
    return form.verify(place, content.kind, sample, emit, content.path)


def _with_attention(sample: VerificationSample, content: Content) -> VerificationSample:
    return replace(sample, attention=sample.attention or content.attention)


def _plain(found: Verification | None) -> dict[str, Any] | None:
    """JSON's words for it, without the seconds: the same run writes the same bytes."""
    if found is None:
        return None
    plain = asdict(found)
    plain.pop("seconds")
    return plain | {key: list(plain[key]) for key in ("missing", "unexpected", "mismatched")}
