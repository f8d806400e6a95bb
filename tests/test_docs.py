"""The documents: links, length of the README, and the templates of docs/extending.md, run."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import cptq
from cptq.activation_sparsity import METHODS as ACTIVATION_METHODS
from cptq.allocation import ALLOCATORS
from cptq.artifact.formats import FORMATS
from cptq.checkpoint import architectures
from cptq.cli.app import app
from cptq.compression import COMPRESSORS
from cptq.config import runtimes
from cptq.evaluation import TASKS
from cptq.inference import operations, reference
from cptq.inference.modules import find_packed_modules
from cptq.registry import Registry
from cptq.sensitivity import METRICS
from tests.conftest import TinyModel
from tests.tiny_models import SENTENCES

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")
ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE = re.compile(r"^```.*?^```", flags=re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n# (cptq/\S+\.py)(.*?)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def _anchors(path: Path) -> set[str]:
    """The fragments that GitHub gives to the headings of a document."""
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    bare = [re.sub(r"[^\w\- ]", "", head.lower().strip()) for head in heads]
    return {head.replace(" ", "-") for head in bare}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if place.startswith(("http://", "https://")):
            continue
        file = (path.parent / place).resolve() if place else path
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            lost.append(target)
    assert lost == []


def test_every_document_is_linked_from_the_readme_or_a_document() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
    for path in DOCUMENTS[1:]:
        others = [text for other, text in texts.items() if other != path]
        assert any(f"{path.name})" in text or f"{path.name}#" in text for text in others), path.name


def test_every_document_has_a_place_on_the_site() -> None:
    pages = re.findall(r"- ([a-z-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    names = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    assert {names.get(path.name, path.name) for path in DOCUMENTS} == {*pages} - {"changelog.md"}


def test_the_picture_shows_measured_figures() -> None:
    measured = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    svg = (ROOT / "docs" / "images" / "front.svg").read_text(encoding="utf-8")
    with (ROOT / "docs" / "images" / "front.csv").open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            size = f"{int(row['bytes']):,}"
            figures = [line for line in measured.splitlines() if f" {size} |" in line]
            assert any(row["perplexity"] in line for line in figures), row["name"]
            assert row["name"] in svg


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The files of docs/extending.md as modules, importable under their names."""
    found: dict[str, Any] = {}
    for file, place, source in BLOCK.findall(EXTENDING):
        if place:
            continue  # a value that goes into a table
        module = ModuleType(file.removesuffix(".py").replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, file, "exec"), module.__dict__)
        found[file] = module
    return found


def _value(file: str, names: dict[str, Any]) -> dict[str, Any]:
    """The entry of a table that a template shows."""
    (source,) = [code for found, place, code in BLOCK.findall(EXTENDING) if found == file and place]
    entry: dict[str, Any] = eval(f"{{{source}}}", names)
    return entry


def _register(monkeypatch: pytest.MonkeyPatch, registry: Registry[Any], name: str) -> None:
    """Add to a registry, in front, what the document says to add to it."""
    (place,) = re.findall(rf'Register: `"{name}": "([\w.:]+)"`', EXTENDING)
    monkeypatch.setattr(registry, "_entries", {name: place, **registry._entries})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    small = ("--calibration", "pydoc", "--samples", "4", "--seqlen", "32", "--device", "cpu")

    def call(command: str, *words: object) -> str:
        more = small if command in ("analyze", "compress") else ()
        answer = CliRunner().invoke(app, [command, *map(str, words), *more])
        assert answer.exit_code == 0, answer.output
        return answer.output

    return call


def test_the_metric_and_the_allocator_work(
    templates: dict[str, Any], run: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, METRICS, "squared-error")
    _register(monkeypatch, ALLOCATORS, "front")
    run(
        *("compress", tiny_model("llama"), "--metric", "squared-error", "--allocator", "front"),
        *("--group-size", "16", "--no-check-uniform", "-o", "out"),
    )
    assert Path("out/cptq.json").exists()
    table = (Path("out") / "sensitivity" / "squared-error.json").read_text()
    assert "squared weight error" in table


def test_the_compressor_and_the_format_work(
    templates: dict[str, Any], run: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _register(monkeypatch, COMPRESSORS, "absmax")
    _register(monkeypatch, FORMATS, "float32")
    _register(monkeypatch, ACTIVATION_METHODS, "median")
    words = ("--allocator", "uniform", "--compressor", "absmax", "--group-size", "16")
    words += ("--activation-sparsity", "median:40%")
    run("compress", tiny_model("gpt2"), "--runtime", "cptq", *words, "-o", "out")
    run("export", "out", "--format", "float32", "-o", "dense")
    values = load_file("dense/model.safetensors").values()
    assert {value.dtype for value in values} == {torch.float32}


def test_the_task_works(
    templates: dict[str, Any],
    run: Any,
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cptq import evaluation

    (kinds,) = re.findall(r"`\"poems\": (\(\"causal-lm\",\))`", EXTENDING)
    _register(monkeypatch, TASKS, "poems")
    monkeypatch.setattr(evaluation, "TASK_KINDS", {**evaluation.TASK_KINDS, "poems": eval(kinds)})
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "test.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    answer = run("eval", tiny_model("llama"), "--task", "poems", "--data-dir", tmp_path)
    assert "poems" in answer
    assert "perplexity" in answer


def test_the_runtime_and_the_family_are_valid(
    run: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = _value("cptq/config/runtimes.py", vars(runtimes))
    family = _value("cptq/checkpoint/architectures.py", vars(architectures))
    monkeypatch.setattr(runtimes, "RUNTIMES", {**runtimes.RUNTIMES, **tool})
    monkeypatch.setattr(architectures, "ARCHITECTURES", {**architectures.ARCHITECTURES, **family})
    model = tiny_model("generic", hidden_size=64, intermediate_size=96, num_attention_heads=4)
    run(
        *("compress", model, "--runtime", "mytool", "--allocator", "even", "--min-bits", "o=8"),
        *("--target", "5bit", "-o", "out"),
    )
    plan = (Path("out") / "plan.json").read_text()
    assert '"model.layers.0.self_attn.qkv"' in plan
    assert '"model.layers.0.self_attn.dense": "w8g32"' in plan


def test_the_kernel_works(
    templates: dict[str, Any], run: Any, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--runtime", "cptq", "--allocator", "uniform", "--compressor", "nearest")
    run("compress", tiny_model("llama"), *words, "--group-size", "16", "-o", "out")
    packed = find_packed_modules(cptq.load("out", device="cpu"))
    _register(monkeypatch, operations.BACKENDS, "whole")
    assert packed
    for module in packed.values():
        weight = module.packed
        backend = operations.find_backend(weight, torch.float32)
        assert backend is templates["cptq/inference/whole.py"].BACKEND
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        expected = reference.linear(x, weight, None)
        torch.testing.assert_close(operations.linear(x, weight, None), expected)
