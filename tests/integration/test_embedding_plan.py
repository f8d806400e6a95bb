"""The width of embeddings in plan.json: what was chosen is replayed, what is edited is obeyed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.config import CompressSettings, settings_from
from cptq.errors import PlanError, UsageError
from cptq.inference.modules import find_packed_modules
from cptq.pipeline import compress
from cptq.report import CompressOutcome
from cptq.types import Plan
from tests.conftest import TinyModel
from tests.integration.test_packed_way import same_process, settings

__all__ = ["same_process"]  # artifacts are verified in this process here too


def run(model: Path, out: Path, **options: Any) -> CompressOutcome:
    return compress(settings(model, out, **options), lambda event: None)


def embedding_of(out: Path) -> str | None:
    packed = find_packed_modules(cptq.load(out, device="cpu"))
    found = packed.get("model.embed_tokens")
    return None if found is None else found.scheme.label


def test_a_plan_replays_with_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float16)
    first = run(model, tmp_path / "a", embedding_bits=8, asymmetric=True, target="5bit")
    file = tmp_path / "a" / "plan.json"
    plan = json.loads(file.read_text())
    assert plan["embedding"] == "w8g64-asym"
    assert Plan.from_dict(plan).to_dict() == plan == first.artifact.manifest["plan"]
    run(model, tmp_path / "b", plan=file, target=None)
    names = ("cptq.safetensors", "plan.json", "config.json")
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )
    file = tmp_path / "edited.json"
    sizes = {"w8g64-asym": first.artifact.weight_bytes}
    for label in ("w6g16", None):
        file.write_text(json.dumps(plan | {"embedding": label}))
        out = tmp_path / str(label)
        sizes[str(label)] = run(model, out, plan=file, target=None).artifact.weight_bytes
        assert (embedding_of(out) is None) is (label is None)
        assert label is None or embedding_of(out) == label
    assert sizes["w6g16"] < sizes["w8g64-asym"] < sizes["None"]
    without = {name: value for name, value in plan.items() if name != "embedding"}
    assert Plan.from_dict(without).embedding is None  # as older plans are


@pytest.mark.parametrize(
    ("label", "runtime", "words"),
    [
        ("w8g64", "transformers", r"packs embeddings \(w8g64\), which --runtime transformers"),
        ("w4g64", "cptq", r"gives the embeddings w4g64; allowed: 6, 7, 8 bits without sparsity"),
        ("w8g64-s50", "cptq", r"gives the embeddings w8g64-s50; allowed: 6, 7, 8"),
        ("w16", "cptq", r"gives the embeddings w16; allowed: .*or null"),
        ("eight", "cptq", r"plan\.json .*'eight'"),
        (8, "cptq", r"plan\.json is not a valid plan"),
    ],
)
def test_an_embedding_that_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, label: object, runtime: str, words: str
) -> None:
    file = tmp_path / "plan.json"
    plan = {
        "model_fingerprint": "f", "budget": {"limit_bytes": 1, "asked": "x"}, "allocator": "x",
        "metric": None, "table_digest": None, "choices": {}, "predicted_bytes": 1,
        "predicted_loss": None, "embedding": label,
    }  # fmt: skip
    file.write_text(json.dumps(plan))
    asked = settings(tmp_path / "no-model", tmp_path / "x", plan=file, target=None)
    with pytest.raises(PlanError, match=words):
        compress(replace(asked, runtime=runtime), lambda event: None)


@pytest.mark.parametrize("option", ["embedding_bits", "asymmetric", "sparsity"])
def test_what_a_plan_says_is_not_said_again(option: str) -> None:
    value = {"embedding_bits": 8, "asymmetric": True, "sparsity": "2:4"}[option]
    line = {"model": "m", "runtime": "cptq", "plan": "p.json", option: value}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} .* --plan"):
        settings_from(CompressSettings, line)
