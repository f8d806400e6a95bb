"""What every registered method keeps to, on a small model: its share, its file, its absence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cptq
from cptq.activation_sparsity import METHODS
from cptq.activation_sparsity.walk import apply_rules, find_function, fit_rules
from cptq.artifact.reader import open_artifact
from cptq.calibration.replay import forward
from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from cptq.errors import ArtifactError, UnknownNameError, UsageError
from cptq.inference.activations import without_activation_sparsity
from cptq.inference.checks import read_rules
from cptq.types import Notice
from tests.conftest import Heard, TinyModel
from tests.reference.sensitivity import random_calibration

SHARE = 0.4
QUICK: dict[str, Any] = {
    **{"runtime": "cptq", "bits": "4,8", "group_size": 16, "target": "6bit", "metric": "pq-index"},
    **{"check_uniform": False, "evaluate": False, "compressor": "nearest", "embedding_bits": 16},
    **{"samples": 4, "seqlen": 32, "device": "cpu"},
}
IDS = torch.arange(3, 40)[None]


def choose_model(method: str) -> str:
    return "opt" if method == "exact" else "llama"


@pytest.mark.parametrize("name", list(METHODS))
def test_it_reaches_its_share_alike_each_time_and_leaves_no_trace(
    name: str, tiny_model: TinyModel, heard: Heard
) -> None:
    path = tiny_model(choose_model(name))
    model = load_model(ModelSettings(model=str(path), device="cpu"), heard)
    batches = random_calibration(model, rows=12).batches
    linears = [spec for unit in model.units for spec in unit.layers]
    method = METHODS.get(name)
    labels = method.list_rules(linears, find_function(model.config))
    dense = forward(model, batches[0]).logits
    rules, reached = fit_rules(model, batches, method, SHARE, labels, heard)
    again, _ = fit_rules(model, batches, method, SHARE, labels, heard)
    assert set(rules) == set(labels)
    for layer, rule in rules.items():
        assert rule.label == again[layer].label == labels[layer]
        for part, value in rule.tensors.items():
            assert torch.equal(value, again[layer].tensors[part])
    numel = {spec.name: spec.numel for spec in linears}
    mean = sum(reached[n] * numel[n] for n in reached) / sum(numel[n] for n in reached)
    if name != "exact":
        assert mean == pytest.approx(SHARE, abs=0.05)
    with apply_rules(model, rules):
        dropped = forward(model, batches[0]).logits
    assert torch.equal(dropped, dense) == (name == "exact")
    assert torch.equal(forward(model, batches[0]).logits, dense)


def compress(model: Path, out: Path, method: str | None, **options: Any) -> Any:
    given = {} if method is None else {"activation_sparsity": method}
    return cptq.compress(model, out=out, progress=lambda _e: None, **QUICK, **given, **options)


def compute(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize(
    "name",
    [n if n == "r-sparse" else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
def test_the_file_holds_the_rules_and_the_loaded_model_applies_them(
    name: str, tiny_model: TinyModel, tmp_path: Path, same_process: None, short_manual: None
) -> None:
    source = tiny_model(choose_model(name))
    option = name if name == "exact" else f"{name}:40%"
    outcome = compress(source, tmp_path / "a", option)
    assert outcome.summary.size.file_bytes == outcome.artifact.weight_bytes
    stored = open_artifact(tmp_path / "a").content
    record = stored.activations
    assert record is not None
    assert record.label == option
    assert record.to_dict() == outcome.summary.activation_sparsity
    assert 0.2 < record.mean < 0.8
    loaded = cptq.load(tmp_path / "a", device="cpu")
    assert loaded.config.quantization_config.rules == record.rules
    for layer in stored.compressed.values():
        module = loaded.get_submodule(layer.spec.name)
        assert (layer.rule is None) == (getattr(module, "rule", None) is None)
        for part, value in ({} if layer.rule is None else layer.rule.tensors).items():
            assert torch.equal(module.rule_tensors[part], value.float())
    with without_activation_sparsity():
        off = compute(loaded)
    assert torch.equal(compute(loaded), off) == (name == "exact")
    plain = cptq.load(tmp_path / "a", device="cpu", activation_sparsity=False)
    assert torch.equal(compute(plain), off)
    assert not any("activation_" in key for key in plain.state_dict())
    loaded.save_pretrained(tmp_path / "s")
    saved = cptq.load(tmp_path / "s", device="cpu")
    assert saved.config.quantization_config.rules == record.rules
    torch.testing.assert_close(compute(saved), compute(loaded), rtol=1e-4, atol=1e-5)
    text = (tmp_path / "a" / "README.md").read_text()
    assert f"Activation sparsity `{option}`" in text
    shown = cptq.inspect(tmp_path / "a").provenance["activation sparsity"]
    assert shown.startswith(f"{option}, ")


@pytest.mark.slow
def test_without_rules_the_weights_are_those_of_a_run_without(
    tiny_model: TinyModel, tmp_path: Path, same_process: None, short_manual: None
) -> None:
    """And another format leaves the rules out, and says so."""
    source = tiny_model("llama")
    heard: list[Any] = []
    compress(source, tmp_path / "a", None)
    (tmp_path / "p.json").write_text((tmp_path / "a" / "plan.json").read_text())
    options = {**QUICK, "activation_sparsity": "statistical-top-k:40%", "plan": tmp_path / "p.json"}
    for fixed in ("bits", "group_size", "target", "metric", "check_uniform", "embedding_bits"):
        options.pop(fixed)
    cptq.compress(source, out=tmp_path / "b", progress=lambda _e: None, **options)
    with without_activation_sparsity():
        found = compute(cptq.load(tmp_path / "b", device="cpu"))
    assert torch.equal(found, compute(cptq.load(tmp_path / "a", device="cpu")))
    again = cptq.export(tmp_path / "b", format="packed", out=tmp_path / "c", progress=heard.append)
    assert not any("rules" in e.message for e in heard if isinstance(e, Notice))
    for name in again.artifact.manifest["weight_files"]:
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    cptq.export(tmp_path / "b", format="dense", out=tmp_path / "d", progress=heard.append)
    notices = [event.message for event in heard if isinstance(event, Notice)]
    assert any("holds no rules for inputs" in message for message in notices)


def test_wrong_options_are_refused_in_a_sentence(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for option, error, word in (
        ("teal", UsageError, "teal:50%"),
        ("teal:150%", UsageError, "1% to 95%"),
        ("exact:50%", UsageError, "takes no share"),
        ("teel:50%", UnknownNameError, "did you mean 'teal'"),
        ("exact", UsageError, "activation function is silu"),
    ):
        with pytest.raises(error, match=word):
            compress(model, tmp_path / "o", option)
    with pytest.raises(UsageError, match="needs feed-forward layers with linears gate"):
        compress(tiny_model("opt"), tmp_path / "o", "chess:50%")
    with pytest.raises(UsageError, match="--runtime cptq"):
        cptq.compress(model, activation_sparsity="teal:50%", out=tmp_path / "o")


def test_a_config_with_wrong_rules_is_refused() -> None:
    modules = {"a": "w4c"}
    assert read_rules(None, modules, 1) == {}
    for entry, version, word in (
        ({"rules": {"a": "value"}}, 3, "no table"),
        ({"rules": []}, 4, "no table"),
        ({"rules": {"a": "values"}}, 4, "not a rule"),
        ({"rules": {"a": 3}}, 4, "rule of 'a'"),
        ({"rules": {"b": "value"}}, 4, "not packed"),
    ):
        with pytest.raises(ArtifactError, match=word):
            read_rules(entry, modules, version)
