"""`cptq verify`: check that an artifact is what was written, and that it computes the same.

First the digests, which cost reading the files once: an error names the first file or tensor that
is missing, new or different from cptq.json. Only then is the artifact reloaded in a fresh process,
which computes the manifest's sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptq.artifact.manifest import MANIFEST, compute_file_digests
from cptq.artifact.reader import find_format, read_manifest
from cptq.artifact.reload import ReloadCheck
from cptq.artifact.sample import read_sample
from cptq.checkpoint.files import read_header
from cptq.checkpoint.loader import AUTO_CLASSES
from cptq.errors import ArtifactError
from cptq.types import Emit, Notice


@dataclass(frozen=True, kw_only=True)
class VerifiedArtifact:
    """An artifact that passed: numbers of files and tensors, and the reload check, if one ran."""

    path: Path
    form: str
    files: int
    tensors: int
    reload: ReloadCheck | None


def verify_artifact(
    directory: Path, emit: Emit, *, trust_remote_code: bool = False
) -> VerifiedArtifact:
    """Check an artifact against its own manifest.

    Raises:
        ArtifactError: it is not what was written, does not load, or computes something else.
        ModelError: a weight file is truncated, corrupt or hostile.
    """
    directory = directory.expanduser().resolve()
    manifest = read_manifest(directory)
    try:
        return _verify(directory, manifest, emit, trust_remote_code)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error})",
            hint="copy the artifact again",
        ) from error


def _verify(
    directory: Path, manifest: Mapping[str, Any], emit: Emit, trusted: bool
) -> VerifiedArtifact:
    form, sizes = find_format(manifest), manifest["weight_files"]
    for name, size in sizes.items():
        _check_file(directory, name, size)
    known_files = manifest["files_sha256"]
    found_files = compute_file_digests(directory, sizes)
    _compare("file", {n: found_files.get(n) for n in known_files}, known_files)
    _compare("tensor", form.compute_digests(directory, sizes), manifest["tensors_sha256"])
    kind = manifest["model"]["kind"]
    if kind not in AUTO_CLASSES:
        raise ValueError(f"a model of kind {kind!r}")
    found = None
    if manifest["sample"] is None:
        message = "holds no sample, so its answers were not compared"
        emit(Notice(kind="warning", subject=MANIFEST, message=message))
    else:
        sample = read_sample(manifest["sample"], trust_remote_code=trusted)
        found = form.check_reload(directory, kind, sample, emit)
    return VerifiedArtifact(
        path=directory,
        form=str(manifest["format"]),
        files=len(known_files) + len(sizes),
        tensors=len(manifest["tensors_sha256"]),
        reload=found,
    )


def _check_file(directory: Path, name: str, size: int) -> None:
    path = directory / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ArtifactError(f"{MANIFEST} names the file {name!r}, which lies outside {directory}")
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint="copy the artifact again")
    if path.stat().st_size != size:
        raise ArtifactError(
            f"{path} has {path.stat().st_size:,} bytes and had {size:,} when it was written",
            hint="copy the artifact again",
        )
    if path.suffix == ".safetensors":
        read_header(path)


def _compare(what: str, found: Mapping[str, str | None], known: Mapping[str, str]) -> None:
    """Digests by name against those of the manifest."""
    wrong = [n for n in known if found.get(n) != known[n]] + [n for n in found if n not in known]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ArtifactError(
            f"the {what} {wrong[0]}{more} is not what was written (its sha256 differs)",
            hint="copy the artifact again",
        )
