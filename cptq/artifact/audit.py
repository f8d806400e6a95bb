"""`cptq verify`: is an artifact still what was written, and does it still answer the same?

First the digests, which cost reading the files once: a file or tensor that is missing, new or other
than cptq.json says is named. Only then is it loaded, in a fresh process, and the manifest's sample
computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cptq.artifact.manifest import MANIFEST, compute_file_digests
from cptq.artifact.reader import find_format, read_manifest
from cptq.artifact.sample import read_sample
from cptq.artifact.verify import Verification
from cptq.checkpoint.files import read_header
from cptq.checkpoint.loader import AUTO_CLASSES
from cptq.errors import ArtifactError
from cptq.types import Emit, Notice


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was checked: numbers of files and tensors, and what the fresh process found."""

    path: Path
    form: str
    files: int
    tensors: int
    verification: Verification | None


def audit(directory: Path, emit: Emit, *, trust_remote_code: bool = False) -> Audit:
    """Check an artifact against its own manifest.

    Raises:
        ArtifactError: it is not what was written, does not load, or answers differently.
        ModelError: a weight file is truncated, corrupt or hostile.
    """
    directory = directory.expanduser().resolve()
    manifest = read_manifest(directory)
    try:
        return _audit(directory, manifest, emit, trust_remote_code)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(
            f"{directory / MANIFEST} is damaged ({type(error).__name__}: {error})",
            hint="copy the artifact again",
        ) from error


def _audit(directory: Path, manifest: Mapping[str, Any], emit: Emit, trusted: bool) -> Audit:
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
        found = form.verify(directory, kind, sample, emit)
    return Audit(
        path=directory,
        form=str(manifest["format"]),
        files=len(known_files) + len(sizes),
        tensors=len(manifest["tensors_sha256"]),
        verification=found,
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
