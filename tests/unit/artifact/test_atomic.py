"""Files and plain directories that appear whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from cptq.artifact import atomic
from cptq.artifact.atomic import atomic_file, new_directory, write_files
from cptq.errors import ArtifactError, OutputExistsError

FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(error: BaseException) -> Any:
    def fail(*_: Any) -> None:
        raise error

    return fail


def test_a_file_is_written_with_its_directories(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "eval.json"
    atomic_file(out, "größer\n", overwrite=False)
    assert out.read_bytes() == "größer\n".encode()
    assert [p.name for p in out.parent.iterdir()] == ["eval.json"]


def test_an_existing_file_is_replaced_only_by_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    atomic_file(out, "old", overwrite=False)
    with pytest.raises(OutputExistsError):
        atomic_file(out, "new", overwrite=False)
    assert out.read_text() == "old"
    atomic_file(out, "new", overwrite=True)
    assert out.read_text() == "new"


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (FULL, ArtifactError, r"disk is full: .*eval\.json.* [\d,]+ bytes.*[\d,]+"),
        (
            OSError(errno.EACCES, "Permission denied"),
            ArtifactError,
            r"eval\.json.*Permission denied",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
)
def test_nothing_of_a_file_stays_after_an_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    words: str,
) -> None:
    out = tmp_path / "eval.json"
    out.write_text("old")
    monkeypatch.setattr(atomic, "write_bytes", failing(error))
    with pytest.raises(raised, match=words):
        atomic_file(out, "new", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]
    assert out.read_text() == "old"


def test_a_file_is_not_written_over_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match=r"out .*: \w+"):
        atomic_file(tmp_path / "out", "new", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_directory_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_directory(out, 2) as folder:
        write_files(folder, {"a.json": b"1", "b/c.json": b"2"})
        assert not out.exists()
    assert (out / "b" / "c.json").read_bytes() == b"2"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [FULL, ValueError(), KeyboardInterrupt()])
def test_nothing_of_a_directory_stays_after_an_error(tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    with new_directory(out) as folder:
        write_files(folder, {"a.json": b"old"})

    def fail() -> None:
        with new_directory(out) as folder:
            write_files(folder, {"a.json": b"new"})
            raise error

    with pytest.raises(ArtifactError if error is FULL else type(error)):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "a.json").read_bytes() == b"old"
