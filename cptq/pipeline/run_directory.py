"""The run directory: what a run has finished of `cptq analyze` or `cptq compress`, safe from kills.

    .OUT.cptq-run/              beside the output OUT, on the same file system
        lock, owner             held while the run lives; the process that holds it
        000-run.*.safetensors   what the run is: options, versions, digests of model and text
        001-sensitivity.*...    one file per finished step (`pipeline.step_files`)
        .OUT-*.partial/         the output in the making, renamed to OUT at the end

Steps are written in the order in which they are finished. Whoever resumes takes the longest run of
intact ones from the beginning; a damaged step is dropped with all that follow it, and made again.
As every step is a file that appears whole, and the output a directory that does, a process may be
killed at any moment.

`open_run` takes the lock, refuses what does not fit and yields a `RunDirectory`. At the end the
directory vanishes; after an error it stays if a step is finished, and the error says so
(`errors.mark_kept`). The lock is one that a dead process does not keep. Whoever waits for a lock
file that its owner removes must not take that for a lock: `filelock` looks whether the file it has
locked still has a name, and then we try again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from cptq.artifact.atomic import explain_error, put_back
from cptq.artifact.manifest import MANIFEST
from cptq.errors import ArtifactError, ResumeError, mark_kept
from cptq.pipeline.recorder import Recorder
from cptq.pipeline.step_files import (
    StepFile,
    list_step_files,
    read_step,
    write_step,
)
from cptq.types import Notice, Progress

T = TypeVar("T")
#: {"--target": "--target 4bit", "torch": "torch 2.13.0", "the model": digest, ...}
Identity = Mapping[str, str]

_LOCK, _OWNER = "lock", "owner"
#: the first step: what the run is; the last one: which output is complete
_RUN, _WRITTEN = "run", "written"
#: times that the lock is tried, and the seconds between: its file may vanish meanwhile
_TRIES, _PAUSE = 5, 0.05
_SUBJECT = "--resume"


def find_run_directory(out: Path) -> Path:
    """Return where the run that writes `out` keeps its steps."""
    place = out.expanduser().resolve()
    return place.with_name(f".{place.name}.cptq-run")


def count_steps(path: Path) -> int:
    """Return how many finished steps a run directory holds, for another process than its owner."""
    return max(0, len(list_step_files(path)) - 1)


class RunDirectory:
    """The finished steps of one run; use `open_run`.

    Args:
        path: the directory, whose lock is held.
        out: the output.
        recorder: receives warnings, and the notices of steps that are taken over.
        marker: a file that every output has, no two outputs the same.
    """

    def __init__(
        self, path: Path, out: Path, recorder: Recorder, *, marker: str = MANIFEST
    ) -> None:
        self.path, self.out = path, out
        self._marker = marker
        self._recorder = recorder
        self._steps: dict[str, StepFile] = {}
        self._identity: dict[str, str] = {}

    @property
    def finished(self) -> int:
        """How many steps are finished."""
        return len(self._steps) - (_RUN in self._steps)

    @property
    def nbytes(self) -> int:
        """The bytes of the steps on the disk."""
        return sum(file.path.stat().st_size for file in self._steps.values())

    def __contains__(self, step: str) -> bool:
        return step in self._steps

    def take_over(self) -> None:
        """Take the steps on the disk as finished, as far as they are intact."""
        files = list_step_files(self.path)
        for index, file in enumerate(files):
            if file.number != index or (index == 0) != (file.step == _RUN) or not file.intact:
                self._drop(files[index:])
                break
            self._steps[file.step] = file

    def _drop(self, files: list[StepFile]) -> None:
        """Remove steps from the first damaged one on, and say so."""
        for file in files:
            file.path.unlink(missing_ok=True)
        more = f", and {len(files) - 1} later ones with it" if len(files) > 1 else ""
        message = f"the step {files[0].step} is damaged on the disk{more}: made again"
        self._recorder(Notice(kind="warning", subject=_SUBJECT, message=message))

    def identify(self, identity: Identity) -> None:
        """Say what the run is, or more of it; nothing else may be resumed.

        Raises:
            ResumeError: the steps are of a run that differs; says in what.
        """
        if _RUN in self._steps:
            begun: dict[str, str] = read_step(self._steps[_RUN])
            wrong = [name for name in identity if begun.get(name) != identity[name]]
            if wrong:
                raise _build_foreign_error(wrong[0], begun, identity, self.path)
        self._identity |= identity

    def read(self, step: str) -> tuple[Any, tuple[Notice, ...]]:
        """Return the value of a finished step, its tensors mapped from the file, and its notices.

        Raises:
            KeyError: it is not finished.
        """
        found: tuple[Any, tuple[Notice, ...]] = read_step(self._steps[step])
        return found

    def load(self, step: str) -> Any:
        """Return the value of a finished step, and pass on its notices."""
        value, notices = self.read(step)
        for notice in notices:
            self._recorder(notice)
        return value

    def save(self, step: str, value: T, notices: tuple[Notice, ...] = ()) -> T:
        """Write a finished step; return it as it will be read back, its tensors mapped.

        A step that was written before is replaced.

        Raises:
            ArtifactError: the disk is full, or cannot be written to.
        """
        if not self._steps:
            self._write(_RUN, self._identity)
        if step in self._steps:
            self._steps.pop(step).path.unlink()
        self._write(step, (value, notices))
        found: T = read_step(self._steps[step])[0]
        return found

    def _write(self, step: str, value: Any) -> None:
        try:
            self._steps[step] = write_step(self.path, len(self._steps), step, value)
        except OSError as error:
            raise self._explain(error, step) from error

    def _explain(self, error: OSError, step: str) -> ArtifactError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return explain_error(error, self.path, 0)
        problem = f"the disk is full: the finished step {step} could not be kept in {self.path}"
        return ArtifactError(problem, hint="make room")

    def keep(self, step: str, make: Callable[[], T]) -> T:
        """Return the value of a step: finished already, or made and kept with its notices."""
        if step in self._steps:
            found: T = self.load(step)
            return found
        before = len(self._recorder.notices)
        value = make()
        return self.save(step, value, tuple(self._recorder.notices[before:]))

    def announce_output(self, folder: Path) -> None:
        """Note which output is complete in `folder`, and about to take its place."""
        self.save(_WRITTEN, self._hash_marker(folder))

    @property
    def owns_output(self) -> bool:
        """Whether the output is that of this run, which was killed before its end."""
        return _WRITTEN in self._steps and self.load(_WRITTEN) == self._hash_marker(self.out)

    def _hash_marker(self, folder: Path) -> str:
        """Return the sha256 of the marker in a folder; empty where there is none."""
        with suppress(OSError):
            return hashlib.sha256((folder / self._marker).read_bytes()).hexdigest()
        return ""

    def clear(self) -> None:
        """Remove everything but the lock."""
        self._steps = {}
        for path in self.path.iterdir():
            if path.name != _LOCK:
                _remove(path)

    def tidy(self) -> None:
        """Remove what a killed process left half-written; a replaced output goes back first."""
        _remove(_name_aside(self.path))
        put_back(self.out, self.path)
        kept = {_LOCK, *(file.path.name for file in list_step_files(self.path))}
        for path in self.path.iterdir():
            if path.name not in kept:
                _remove(path)
        named = self.path / f"{_OWNER}.new"  # read by others while it is written
        named.write_text(str(os.getpid()), encoding="utf-8")
        named.replace(self.path / _OWNER)


def _build_foreign_error(name: str, begun: Identity, identity: Identity, path: Path) -> ResumeError:
    before, now = begun.get(name), identity[name]
    if name.startswith("the "):
        return ResumeError(
            f"{path} was begun with another {name.removeprefix('the ')}: {name} of now is not "
            "the same",
            hint="leave out --resume and add --overwrite to start anew, or name another -o",
        )
    return ResumeError(
        f"it was begun with {before or f'no {name}'}, this run says {now or f'no {name}'}",
        hint=f"type what it was begun with, or --overwrite in place of --resume to start anew "
        f"(the finished steps are in {path})",
    )


@contextmanager
def open_run(
    out: Path,
    identity: Identity,
    recorder: Recorder,
    *,
    resume: bool,
    overwrite: bool,
    marker: str = MANIFEST,
) -> Iterator[RunDirectory]:
    """Yield the run directory of an output, whose lock is held inside the with-block.

    Args:
        out: the output directory.
        identity: what is known of the run before anything is loaded.
        recorder: receives warnings, and the notices of steps that are taken over.
        resume: go on from the steps that are there; without any the run begins, with a notice.
        overwrite: drop those steps, unless they are resumed.
        marker: a file that every output has, no two outputs the same.

    Raises:
        ResumeError: another run holds the lock, there are steps and neither `resume` nor
            `overwrite`, or they are of a run that differs.
    """
    path = find_run_directory(out)
    made = _make_directories(path)
    lock = _acquire(path, out)
    run = RunDirectory(path, out.expanduser().resolve(), recorder, marker=marker)
    try:
        if overwrite and not resume:
            run.tidy()
            run.clear()
        _check_steps(run, resume=resume, overwrite=overwrite)
        if resume and not list_step_files(path):
            message = f"no step of {out} was finished: the run begins"
            recorder(Notice(kind="info", subject="--resume", message=message))
        run.tidy()
        run.take_over()
        run.identify(identity)
        if run.finished:
            message = f"{run.finished} finished steps are taken over"
            recorder(Progress(stage="resume", done=1, total=1, message=message))
        yield run
        _remove_all(run, made)
    except BaseException as error:
        left = len(list_step_files(path))
        if not isinstance(error, ResumeError):
            mark_kept(error, max(0, left - 1), str(path))
        if not left:
            _remove_all(run, made)
        raise
    finally:
        lock.release()


def _check_steps(run: RunDirectory, *, resume: bool, overwrite: bool) -> None:
    there = list_step_files(run.path)
    if there and not resume and not overwrite:
        raise ResumeError(
            f"an earlier run did not finish {run.out} and left {max(1, len(there) - 1)} steps in "
            f"{run.path}",
            hint="add --resume to go on from them, or --overwrite to start anew",
        )


def _make_directories(path: Path) -> list[Path]:
    """Make a directory; return those that were made, the innermost first."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        _make_directory(path)
    except OSError as error:
        raise explain_error(error, path, 0) from error
    return made


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # also where another run removes it between two looks of `mkdir`
        if path.exists() and not path.is_dir():
            raise


def _acquire(path: Path, out: Path) -> FileLock:
    lock = FileLock(path / _LOCK)
    for _ in range(_TRIES):
        try:
            _make_directory(path)  # its owner may just have removed it
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):
            time.sleep(_PAUSE)
        except OSError as error:
            raise explain_error(error, path, 0) from error
        else:
            return lock
    owner = _read_owner(path)
    raise ResumeError(
        f"another run{owner} is writing {out}",
        hint="wait until it has ended, or name another directory with -o",
    )


def _read_owner(path: Path) -> str:
    with suppress(OSError):
        return f" (process {(path / _OWNER).read_text(encoding='utf-8')})"
    return ""


def _remove_all(run: RunDirectory, made: list[Path]) -> None:
    """Remove the directory, and those that were made for an output that there is not.

    It is renamed first, so that no kill leaves some of its steps.
    """
    with suppress(OSError):
        aside = _name_aside(run.path)
        run.path.rename(aside)
        _remove(aside)
    with suppress(OSError):
        for place in made:
            if place != run.path:
                place.rmdir()  # fails where there is an output


def _name_aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
