"""Write an artifact as a draft: weights, config, companions, manifest, reports.

    with draft(out, overwrite=False, source=model.path, form="packed", emit=emit) as d:
        d.write(content, record)
        check = d.verify(sample)
        d.add({"report.json": ...})
    artifact = d.artifact

The draft is a temporary directory beside `out`, or `inside` another one, which takes the place of
`out` at the end of the with-block.
After any exception inside nothing of it is left, and an older artifact is untouched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cptq.artifact.atomic import (
    check_output,
    check_space,
    create_directory,
    explain_error,
    write_bytes,
    write_files,
)
from cptq.artifact.card import CARD, build_card
from cptq.artifact.companions import count_companion_bytes
from cptq.artifact.content import Content
from cptq.artifact.formats import DEFAULT_FORMAT, FORMATS
from cptq.artifact.formats.interface import Format
from cptq.artifact.manifest import (
    MANIFEST,
    TUNED,
    build_manifest,
    compute_file_digests,
    encode_manifest,
)
from cptq.artifact.reload import ReloadCheck, ReloadSample
from cptq.artifact.sample import record_sample
from cptq.errors import ArtifactError
from cptq.types import Artifact, CalibrationRecord, Emit, Notice, Plan, Progress


@dataclass(frozen=True, kw_only=True)
class Record:
    """How the content was made; `more` goes into the manifest as it is.

    `tuned` says what `compress --tune` changed and what that brought; None: nothing was tuned.
    """

    plan: Plan
    calibration: CalibrationRecord
    seed: int
    tuned: Mapping[str, Any] | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Written:
    """What `Draft.write` wrote: `files` is {name: bytes} of the weight files."""

    content: Content
    record: Record
    files: Mapping[str, int]


@contextmanager
def draft(
    out: Path,
    *,
    overwrite: bool,
    source: Path,
    form: str = DEFAULT_FORMAT,
    inside: Path | None = None,
    emit: Emit,
) -> Iterator[Draft]:
    """Yield a draft of the artifact `out`, which replaces `out` at the end of the with-block.

    Args:
        out: the output directory.
        overwrite: replace an older artifact, once the new one is complete.
        source: directory of the model or artifact that it is made from, which is never replaced.
        form: a name of `FORMATS`.
        inside: the directory that holds the draft, on the same file system; beside `out` without.
        emit: receives progress and notices.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is not set.
        ArtifactError: `out` may not be replaced, or the disk is full or cannot be written to.
    """
    place = check_output(out, overwrite=overwrite, source=source)
    with create_directory(place, inside=inside) as folder:
        made = Draft(out=place, folder=folder, form=FORMATS.get(form), emit=emit)
        try:
            yield made
        except OSError as error:
            raise explain_error(error, place, made.need) from error
        artifact = made.artifact  # raises where `verify` was not called
    emit(Progress(stage="write", done=2, total=2, message=str(artifact.path)))


@dataclass(kw_only=True, eq=False)
class Draft:
    """An artifact in the making; use `draft`, which puts it in place.

    Call `write`, then `verify`, which writes the manifest, then `add` for files that the manifest
    does not cover. `need` counts the bytes, for the message of a full disk.
    """

    out: Path
    folder: Path
    form: Format
    emit: Emit
    need: int = 0
    _written: _Written | None = None
    _artifact: Artifact | None = None

    def write(
        self, content: Content, record: Record, extras: Mapping[str, bytes] | None = None
    ) -> None:
        """Write the weights, and all that belongs beside them but the manifest.

        Args:
            content: the model; without compressed layers it becomes a dense copy.
            record: how it was made.
            extras: {relative path: content} of more files that the manifest covers.

        Raises:
            ArtifactError: the format cannot hold a layer, an extra file has no valid name, or the
                disk has no room for all of it.
        """
        self.form.check(content)
        extras = dict(extras or {})
        _check_names(extras)
        size = self.form.estimate_bytes(content) + count_companion_bytes(content.path)
        self.need = size + sum(map(len, extras.values()))
        check_space(self.folder.parent, self.need)
        self.emit(Progress(stage="write", done=0, total=2, message=f"{size:,} bytes"))
        files = self.form.write(content, self.folder, self.emit)
        write_files(self.folder, extras)
        self._written = _Written(content=content, record=record, files=files)
        self._write_card(self._written, None)

    def verify(
        self, sample: ReloadSample | None, *, short: ReloadSample | None = None
    ) -> ReloadCheck | None:
        """Reload what was written in a fresh process, compare, and write the manifest.

        Args:
            sample: inputs and expected outputs, which the manifest keeps; None skips the check,
                with a warning.
            short: compare with these instead, of the first blocks alone.

        Raises:
            ArtifactError: it does not load, or its outputs differ.
        """
        if self._written is None:
            raise RuntimeError("a draft is written before it is verified")
        message = "verifying in a fresh process"
        self.emit(Progress(stage="write", done=1, total=2, message=message))
        written, content = self._written, self._written.content
        if sample is not None:
            sample = replace(sample, attention=sample.attention or content.attention)
            short = short and replace(short, attention=sample.attention)
        check = self._reload(content, short or sample)
        manifest = _build_manifest(self.form, written, self.folder)
        manifest["verification"] = _plain_check(check)
        manifest.setdefault("sample", sample and record_sample(sample))
        write_bytes(self.folder / MANIFEST, encode_manifest(manifest))
        self._artifact = Artifact(
            path=self.out,
            weight_bytes=sum(written.files.values()),
            format=manifest["format"],
            manifest=manifest,
        )
        return check

    def add(self, files: Mapping[str, bytes]) -> None:
        """Write {relative path: content} beside the artifact; the manifest does not cover them.

        Raises:
            ArtifactError: a name that is absolute, leads outside, or is that of a weight file.
        """
        _check_names(files)
        self.need += sum(map(len, files.values()))
        write_files(self.folder, files)

    def describe(self, report: Mapping[str, Any]) -> None:
        """Write the model card anew, from the data of report.json; no manifest covers it."""
        if self._written is None:
            raise RuntimeError("a draft is written before it is described")
        self._write_card(self._written, report)

    def _write_card(self, written: _Written, report: Mapping[str, Any] | None) -> None:
        record = written.record
        card = build_card(
            written.content,
            self.form,
            record.plan,
            record.calibration,
            sum(written.files.values()),
            tuned=record.tuned,
            report=report,
        )
        write_bytes(self.folder / CARD, card.encode())

    @property
    def artifact(self) -> Artifact:
        """The verified artifact; it is in place after the with-block."""
        if self._artifact is None:
            raise RuntimeError("a draft is verified before it becomes an artifact")
        return self._artifact

    def _reload(self, content: Content, sample: ReloadSample | None) -> ReloadCheck | None:
        if sample is None:
            message = "was not compared with the model in memory, as no sample was given"
            self.emit(Notice(kind="warning", subject="artifact", message=message))
            return None
        return self.form.check_reload(self.folder, content.kind, sample, self.emit, content.path)


def _build_manifest(form: Format, written: _Written, folder: Path) -> dict[str, Any]:
    content, record, files = written.content, written.record, written.files
    manifest = build_manifest(
        content,
        record.plan,
        calibration=record.calibration,
        seed=record.seed,
        form=form.name,
        weight_format=form.label(content),
        weight_files=files,
        digests=form.compute_digests(folder, files),
    )
    manifest["files_sha256"] = compute_file_digests(folder, files)
    tuned = {} if record.tuned is None else {TUNED: dict(record.tuned)}
    return manifest | tuned | dict(record.more)


def _check_names(files: Mapping[str, bytes]) -> None:
    for name in files:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or path.suffix == ".safetensors":
            raise ArtifactError(f"{name!r} is no name for a file beside the weights")


def _plain_check(found: ReloadCheck | None) -> dict[str, Any] | None:
    """Return the check as plain data, but for what the same run does not always find the same."""
    if found is None:
        return None
    plain = asdict(found)
    del plain["seconds"], plain["weight_bytes"]  # of this machine, and of transformers
    return plain | {key: list(plain[key]) for key in ("missing", "unexpected", "mismatched")}
