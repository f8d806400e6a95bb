"""`import cptq` is light, and transformers knows the method whenever it comes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from cptq.inference import registration


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A stand-in for transformers' table of methods; what is registered is noted here."""
    noted: list[str] = []
    (tmp_path / "table_of_methods.py").write_text("def register_quantizer(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registration, "TABLE", "table_of_methods")
    monkeypatch.setattr(registration, "_register", lambda: noted.append("registered"))
    waiting = [f for f in sys.meta_path if not isinstance(f, registration._ImportWatcher)]
    monkeypatch.setattr(sys, "meta_path", waiting)
    monkeypatch.delitem(sys.modules, "table_of_methods", raising=False)
    return noted


def test_registers_when_the_table_is_imported_later(calls: list[str]) -> None:
    registration.ensure_registered()
    registration.ensure_registered()
    assert sum(isinstance(f, registration._ImportWatcher) for f in sys.meta_path) == 1
    assert calls == []
    importlib.import_module("json")
    assert calls == []
    table = importlib.import_module("table_of_methods")
    assert calls == ["registered"]
    assert hasattr(table, "register_quantizer")
    assert type(table.__loader__).__name__ == "SourceFileLoader"
    assert not any(isinstance(f, registration._ImportWatcher) for f in sys.meta_path)


def test_registers_at_once_when_the_table_is_there(calls: list[str]) -> None:
    importlib.import_module("table_of_methods")
    registration.ensure_registered()
    assert calls == ["registered"]


def test_a_table_that_cannot_be_imported_is_no_matter_of_ours(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "TABLE", "no_such_table_of_methods")
    registration.ensure_registered()
    with pytest.raises(ModuleNotFoundError, match="no_such_table_of_methods"):
        importlib.import_module("no_such_table_of_methods")
    assert calls == []


def test_importing_cptq_imports_nothing_heavy() -> None:
    code = (
        "import sys, cptq; heavy = {'torch', 'transformers', 'numpy', 'cptq.checkpoint'};"
        "print(sorted(heavy & set(sys.modules)), cptq.__version__, 'load' in dir(cptq))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "[]"


def test_names_that_are_not_there_are_missed() -> None:
    import cptq

    with pytest.raises(AttributeError, match="'lod'"):
        _ = cptq.lod  # type: ignore[attr-defined]


def test_transformers_knows_the_method() -> None:
    from transformers.quantizers.auto import (
        AUTO_QUANTIZATION_CONFIG_MAPPING,
        AUTO_QUANTIZER_MAPPING,
    )

    from cptq.inference.quantizer import CptqConfig, CptqQuantizer, register

    register()  # a second time changes nothing
    assert AUTO_QUANTIZER_MAPPING["cptq"] is CptqQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["cptq"] is CptqConfig
