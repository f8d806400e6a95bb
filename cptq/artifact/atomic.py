"""Directories and files that appear whole or not at all.

Everything is written to a temporary place beside the output (on the same file system, so that a
rename is atomic) and synced. Only a complete result is renamed to the output's name, and only then
is an older one removed. An error or Ctrl-C before that leaves the disk as it was.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cptq.artifact.manifest import MANIFEST
from cptq.errors import ArtifactError, OutputExistsError

#: room for the files beside the weights that are not counted one by one
_MARGIN = 1 << 20
#: what the names of a directory in the making, and of one that it replaces, end in
_PARTIAL, _OLD = ".partial", ".old"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_output(out: Path, *, overwrite: bool, source: Path, marker: str = MANIFEST) -> Path:
    """Check that a directory may be written to `out`; cheap, so call it before the work.

    Args:
        out: the output directory.
        overwrite: replace an older one.
        source: directory of the model, which is never replaced.
        marker: a file that every output of this command has; a directory without it is kept.

    Returns:
        `out`, absolute and without links.

    Raises:
        OutputExistsError: it exists and `overwrite` is not set.
        ArtifactError: it is or holds the model itself, or something that cptq did not write.
    """
    out = out.expanduser().resolve()
    source = source.resolve()
    if out == source or out in source.parents:
        raise ArtifactError(
            f"{out} is or holds the model that is being compressed", hint="name another directory"
        )
    if not out.exists():
        return out
    if not overwrite:
        raise OutputExistsError(
            f"the output {out} is already there",
            hint="pass --overwrite to replace it, or name another directory with -o",
        )
    if not out.is_dir() or not ((out / marker).exists() or next(out.iterdir(), None) is None):
        raise ArtifactError(
            f"{out} was not written by cptq (it has no {marker}), so it is not replaced",
            hint="remove it yourself, or name another directory with -o",
        )
    return out


def refuse_existing(out: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError where the file `out` exists and may not be replaced."""
    if out.exists() and not overwrite:
        raise OutputExistsError(f"{out} is there already", hint="pass --overwrite to replace it")


@contextmanager
def create_directory(out: Path, need: int = 0, *, inside: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory that is renamed to `out` at the end of the with-block.

    Args:
        out: the output directory, as `check_output` returned it.
        need: bytes that will be written, checked against the free space; 0 where not known yet.
        inside: a directory on the same file system that holds it, and for a moment an older output
            (`put_back`); beside `out` without.

    Raises:
        ArtifactError: the disk is or becomes full, or cannot be written to.
    """
    with _explain_errors(out, need):
        out.parent.mkdir(parents=True, exist_ok=True)
        if need:
            check_space(out.parent, need)
        beside = inside or out.parent
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=_PARTIAL, dir=beside))
        try:
            yield place
            _settle(place, out)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def write_file(out: Path, content: str, *, overwrite: bool) -> None:
    """Write a text file whole or not at all.

    Raises:
        OutputExistsError: `out` exists and may not be replaced.
        ArtifactError: the disk is full, or cannot be written to.
    """
    refuse_existing(out, overwrite=overwrite)
    raw = content.encode()
    with _explain_errors(out, len(raw)):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as place:
            draft = Path(place) / out.name
            write_bytes(draft, raw)
            draft.replace(out)
        sync_directory(out.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a small file into a temporary place, and sync it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def write_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write {relative path: content} below a directory, each synced."""
    for name, content in files.items():
        write_bytes(directory / name, content)


def check_space(directory: Path, need: int, *, parts: str = "", hint: str | None = None) -> None:
    """Raise ArtifactError where the disk of a directory (to be) has no room for `need` bytes.

    `parts` says in words what they are for, `hint` what to do where it is not the usual.
    """
    free = count_free_bytes(directory)
    if free < need + _MARGIN:
        raise _build_full_error(directory, need + _MARGIN, free, parts, hint)


def explain_error(error: OSError, out: Path, need: int) -> ArtifactError:
    """Return a system error as one sentence about the output, which needs `need` bytes."""
    if error.errno in _FULL:
        return _build_full_error(out, need + _MARGIN, count_free_bytes(out.parent))
    reason = error.strerror or str(error)
    return ArtifactError(f"{out} cannot be written: {reason}", hint="name another place with -o")


@contextmanager
def _explain_errors(out: Path, need: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain_error(error, out, need) from error


def count_free_bytes(directory: Path) -> int:
    """Return the free bytes of the disk that holds, or will hold, a directory."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free


def _build_full_error(
    path: Path, need: int, free: int, parts: str = "", hint: str | None = None
) -> ArtifactError:
    more = f" ({parts})" if parts else ""
    return ArtifactError(
        f"the disk is full: {path} needs {need:,} bytes{more} and {free:,} are free",
        hint=hint or "make room, or name another place with -o",
    )


def _settle(place: Path, out: Path) -> None:
    """Rename the temporary directory; an older one is moved aside first and removed last."""
    place.chmod(0o777 & ~_read_umask())
    sync_directory(place)
    aside = place.with_suffix(_OLD)
    replaced = out.exists()
    if replaced:
        out.rename(aside)
    try:
        place.rename(out)
    except BaseException:
        if replaced:
            aside.rename(out)
        raise
    sync_directory(out.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def put_back(out: Path, inside: Path) -> None:
    """Undo half a replacement, where a process was killed between the two renames of `_settle`."""
    for aside in inside.glob(f".{out.name}-*{_OLD}"):
        if not out.exists():
            aside.rename(out)
            sync_directory(out.parent)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync_directory(directory: Path) -> None:
    """Make the names in a directory as durable as the files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
