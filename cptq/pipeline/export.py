"""`cptq export`: an artifact in another file format, its integers as they are."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from cptq.artifact.content import Content
from cptq.artifact.draft import Record, draft
from cptq.artifact.formats import FORMATS
from cptq.artifact.formats.interface import Format
from cptq.artifact.hub import check_push, push
from cptq.artifact.manifest import MANIFEST, TUNED
from cptq.artifact.reader import StoredArtifact, open_artifact
from cptq.config import ExportSettings, parse_shard_size
from cptq.errors import UsageError
from cptq.layouts.safetensors_header import SHARD_BYTES
from cptq.types import Artifact, Emit, Notice


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOutcome:
    """The result of `export`: what was written, its size before, and where it was uploaded."""

    artifact: Artifact
    bytes_before: int
    repository: str | None = None


def export(settings: ExportSettings, emit: Emit) -> ExportOutcome:
    """Write an artifact in another format.

    Raises:
        CptqError: it is no artifact, the format cannot hold a layer, or the result fails its check.
    """
    form = FORMATS.get(settings.format)
    most = _read_shard_bytes(settings, form)
    if settings.push_to_hub is not None:
        check_push(settings.push_to_hub, settings.token)
    stored = open_artifact(settings.artifact, trust_remote_code=settings.trust_remote_code)
    form.check(stored.content)
    out = settings.out or Path(f"{stored.path.resolve().name}-{form.name}")
    if stored.sample is None:
        message = "holds no sample of outputs, so what is written cannot be compared"
        emit(Notice(kind="warning", subject=str(stored.path), message=message))
    with draft(
        out, overwrite=settings.overwrite, source=stored.path, form=form.name, emit=emit
    ) as d:
        content = _leave_out_rules(stored.content, form, emit)
        d.write(replace(content, shard_bytes=most), _record(stored))
        d.verify(stored.sample)
    repository = None
    if settings.push_to_hub is not None:
        repository = push(d.artifact.path, settings.push_to_hub, token=settings.token, emit=emit)
    before = sum(stored.manifest["weight_files"].values())
    return ExportOutcome(artifact=d.artifact, bytes_before=before, repository=repository)


def _leave_out_rules(content: Content, form: Format, emit: Emit) -> Content:
    """Return the content without activation sparsity where the format does not hold it."""
    if content.activations is None or form.holds_rules:
        return content
    message = f"{content.activations.label} is left out: {form.name} holds no rules for inputs"
    emit(Notice(kind="warning", subject="activation sparsity", message=message))
    layers = {name: replace(layer, rule=None) for name, layer in content.compressed.items()}
    return replace(content, compressed=layers, activations=None)


def _read_shard_bytes(settings: ExportSettings, form: Format) -> int:
    """Return --max-shard-size in bytes; refuse another than the usual where there is one file."""
    most = parse_shard_size(settings.max_shard_size)
    if most != SHARD_BYTES and not form.sharded:
        raise UsageError(
            f"--max-shard-size has no effect with --format {form.name}, which is one file",
            hint="leave out --max-shard-size",
        )
    return most


def _record(stored: StoredArtifact) -> Record:
    """Return the artifact's own history, and the digest of its manifest."""
    digest = hashlib.sha256((stored.path / MANIFEST).read_bytes()).hexdigest()
    origin = {"format": stored.manifest["format"], "manifest_sha256": digest}
    return Record(
        plan=stored.plan,
        calibration=stored.calibration,
        seed=stored.seed,
        tuned=stored.manifest.get(TUNED),
        more={"exported_from": origin, "sample": stored.manifest["sample"]},
    )
