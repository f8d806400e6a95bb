"""`cptq methods`: every registered name is described."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cptq.catalogue import UNKNOWN, list_methods
from cptq.config import RUNTIMES, MethodsSettings
from cptq.errors import UsageError
from cptq.inference.operations import BACKENDS
from cptq.sensitivity import METRICS

METHODS = list_methods(MethodsSettings()).methods


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.name}")
def test_every_name_has_a_line(method: object) -> None:
    facts = getattr(method, "facts")  # noqa: B009
    assert facts is not UNKNOWN
    assert facts.does
    assert facts.good
    assert "\n" not in facts.does + facts.source + facts.cost + facts.good


def test_every_kind_is_listed() -> None:
    kinds = {method.kind for method in METHODS}
    assert kinds == {"metric", "allocator", "compressor", "format", "task", "runtime"} | {
        "activation-rule"
    }
    assert [m.name for m in METHODS if m.kind == "metric"] == METRICS.list_names()
    assert [m.name for m in METHODS if m.kind == "runtime"] == list(RUNTIMES)
    assert all(BACKENDS.find_facts(name) for name in BACKENDS)


def test_kinds_and_names_choose() -> None:
    found = list_methods(MethodsSettings(names=("allocators", "gptq"))).methods
    assert {m.kind for m in found} == {"allocator", "compressor"}
    with pytest.raises(UsageError, match="did you mean 'output'"):
        list_methods(MethodsSettings(names=("otput",)))


def test_it_needs_no_torch() -> None:
    code = "import sys, cptq.catalogue as c; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
