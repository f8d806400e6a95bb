"""Errors of the GGUF reader for a file with a very long or a short damaged name."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cptq.artifact.gguf.header import read_gguf
from cptq.errors import ArtifactError


def with_key(key: bytes, kind: int) -> bytes:
    """A file of one metadata entry."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
    return head + struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + bytes(16)


def test_a_long_name_is_cut_and_the_reason_kept(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    path.write_bytes(with_key(b"general.name" + b"\0" * 14000, 65536))
    with pytest.raises(ArtifactError, match=r"'general\.name.* \.\.\. .*65536"):
        read_gguf(path)
    with pytest.raises(ArtifactError) as caught:
        read_gguf(path)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_short_name_is_quoted_whole(tmp_path: Path) -> None:
    path = tmp_path / "made.gguf"
    path.write_bytes(with_key(b"general.name", 99))
    with pytest.raises(ArtifactError, match=r"'general\.name'.*99"):
        read_gguf(path)
