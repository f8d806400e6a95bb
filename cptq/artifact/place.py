"""A directory that appears whole or not at all.

Everything is written to a temporary directory beside the goal (the same file system, so that a
rename is atomic). Only when it is complete and verified does it take the goal's place, and only
then is an older artifact removed. Whatever goes wrong before, Ctrl-C included, changes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cptq.artifact.manifest import MANIFEST
from cptq.errors import ArtifactError, OutputExistsError

#: room for the files beside the weights that are not counted one by one
_MARGIN = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_output(out: Path, *, overwrite: bool, source: Path, marker: str = MANIFEST) -> Path:
    """Whether a directory may be written to `out`; cheap, so ask before the work is done.

    Args:
        out: the directory to be.
        overwrite: an older one there may be replaced.
        source: directory of the model, which is never replaced.
        marker: a file that every directory of this sort has; without it nothing is replaced.

    Returns:
        `out`, absolute and without links.

    Raises:
        OutputExistsError: it is there and `overwrite` is not set.
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


@contextmanager
def new_directory(out: Path, need: int) -> Iterator[Path]:
    """A temporary directory that becomes `out` (which `check_output` has passed) at the end.

    Args:
        out: the directory to be.
        need: bytes that will be written, checked against the free space.

    Raises:
        ArtifactError: the disk is or becomes full, or cannot be written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_space(out.parent, need)
        place = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise explained(error, out, need) from error
    try:
        yield place
        _settle(place, out)
    except OSError as error:
        raise explained(error, out, need) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def check_space(directory: Path, need: int) -> None:
    """Raise ArtifactError when the disk of a directory (to be) has no room for `need` bytes."""
    existing = next(place for place in (directory, *directory.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < need + _MARGIN:
        raise _full(directory, need + _MARGIN, free)


def explained(error: OSError, out: Path, need: int) -> ArtifactError:
    """What the system said, as one sentence."""
    if error.errno in _FULL:
        existing = next(p for p in (out.parent, *out.parent.parents) if p.exists())
        return _full(out, need + _MARGIN, shutil.disk_usage(existing).free)
    reason = error.strerror or str(error)
    return ArtifactError(f"{out} cannot be written: {reason}", hint="name another place with -o")


def _full(path: Path, need: int, free: int) -> ArtifactError:
    return ArtifactError(
        f"the disk is full: {path} needs {need:,} bytes and {free:,} are free; nothing was kept",
        hint="make room, or name another place with -o",
    )


def _settle(place: Path, out: Path) -> None:
    """Rename, the old one moved aside first and removed last."""
    place.chmod(0o777 & ~_umask())
    _sync(place)
    aside = place.with_suffix(".old")
    replaced = out.exists()
    if replaced:
        out.rename(aside)
    try:
        place.rename(out)
    except BaseException:
        if replaced:
            aside.rename(out)
        raise
    _sync(out.parent)
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(directory: Path) -> None:
    """Make the names in a directory as durable as the files."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
