"""`cptq doctor`: what is there, what is missing, and the exit code."""

from __future__ import annotations

from pathlib import Path

import pytest

from cptq import doctor
from cptq.config import DoctorSettings
from tests.unit.cli.conftest import Cptq, FakePipeline, cptq, pipeline

__all__ = ["FakePipeline", "cptq", "pipeline"]  # fixtures


def test_a_machine_that_runs_the_tests_is_well(cptq: Cptq) -> None:
    found = cptq("doctor")
    assert found.exit_code == 0, found.output
    for section in ("Versions", "Machine", "Kernels", "Data", "Missing"):
        assert f"\n{section}\n" in f"\n{found.stdout}"
    assert max(map(len, found.stdout.splitlines())) <= 80


def test_what_is_required_and_missing_fails(cptq: Cptq, monkeypatch: pytest.MonkeyPatch) -> None:
    known = doctor._find_version
    monkeypatch.setattr(doctor, "_find_version", lambda p: "" if p == "safetensors" else known(p))
    monkeypatch.setattr(doctor, "_list_required", lambda: ["torch", "safetensors"])
    found = cptq("doctor")
    assert found.exit_code == 1
    assert "pip install safetensors" in found.stdout
    assert cptq("doctor", "--format", "quiet").stdout.split().count("safetensors") == 1


def test_data_is_found_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPTQ_DATA", raising=False)
    (tmp_path / "wikitext-2-raw").mkdir()
    (tmp_path / "wikitext-2-raw" / "wiki.test.raw").write_text("text")
    found = {f.name: f for f in doctor.examine(DoctorSettings(data_dir=tmp_path)).findings}
    assert found["WikiText-2, evaluation"].found == "wikitext-2-raw/wiki.test.raw"
    assert found["GLUE"].state == "absent"
    assert "CPTQ_DATA" in found["GLUE"].remedy
    lost = doctor.examine(DoctorSettings(data_dir=tmp_path / "nowhere"))
    assert any("not a directory" in f.remedy for f in lost.missing)
    assert lost.works
