"""The width of embeddings in plan.json: what was chosen is replayed, what is edited is obeyed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import cptq
from cptq.artifact.reader import open_artifact
from cptq.checkpoint.files import read_header
from cptq.config import CompressSettings, settings_from
from cptq.errors import PlanError, UsageError
from cptq.inference.modules import find_packed_modules
from cptq.pipeline import compress
from cptq.pipeline.compress import plan
from cptq.report import CompressOutcome
from cptq.types import Plan
from tests.conftest import TinyModel
from tests.integration.test_packed_way import settings
from tests.quick import cover
from tests.unit.artifact.builders import load

pytestmark = pytest.mark.usefixtures("same_process")


def run(model: Path, out: Path, **options: Any) -> CompressOutcome:
    return compress(settings(model, out, **options), lambda event: None)


def embedding_of(out: Path) -> str | None:
    packed = find_packed_modules(cptq.load(out, device="cpu"))
    found = packed.get("model.embed_tokens")
    return None if found is None else found.scheme.label


def test_a_plan_replays_with_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float16, tied=True)
    first = run(model, tmp_path / "a", embedding_bits=8, asymmetric=True, target="7bit")
    file = tmp_path / "a" / "plan.json"
    plan = json.loads(file.read_text())
    assert plan["choices"]["model.embed_tokens"] == "w8g64-asym"
    assert Plan.from_dict(plan).to_dict() == plan == first.artifact.manifest["plan"]
    run(model, tmp_path / "b", plan=file, target=None)
    names = ("cptq.safetensors", "plan.json", "config.json")
    assert all(
        (tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names
    )
    file = tmp_path / "edited.json"
    sizes = {"w8g64-asym": first.artifact.weight_bytes}
    for label in ("w6g16", "w16"):
        edited = {**plan["choices"], "model.embed_tokens": label}
        file.write_text(json.dumps(plan | {"choices": edited}))
        out = tmp_path / label
        sizes[label] = run(model, out, plan=file, target=None).artifact.weight_bytes
        assert embedding_of(out) == (None if label == "w16" else label)
    assert sizes["w6g16"] < sizes["w8g64-asym"] < sizes["w16"]


@pytest.mark.parametrize(
    ("label", "runtime", "words"),
    [
        ("w8g16", "transformers", r"w8g16 for model.embed_tokens .* the format has in 16 bits"),
        ("f8e4m3", "vllm", r"gives model.embed_tokens f8e4m3: vllm takes no 8-bit floats"),
        ("w2g16", "cptq", r"w2g16: cptq takes embeddings and heads of 3, 4, 5, 6, 7, 8 bits"),
        ("w8g16-s50", "cptq", r"w8g16-s50 for .*a sparse embedding"),
        ("f8e4m3", "cptq", r"f8e4m3 for .*packed integers serve better"),
    ],
)
def test_an_embedding_that_cannot_be_is_refused(
    tiny_model: TinyModel, tmp_path: Path, label: str, runtime: str, words: str
) -> None:
    model = tiny_model("llama", dtype=torch.float16, tied=True)
    loaded = load(model)
    choices = {unit.name: "w16" for unit in loaded.units} | {"model.embed_tokens": label}
    plan = {
        "model_fingerprint": loaded.fingerprint, "budget": {"limit_bytes": 1, "asked": "x"},
        "allocator": "x", "metric": None, "table_digest": None, "choices": choices,
        "predicted_bytes": 1, "predicted_loss": None,
    }  # fmt: skip
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    asked = settings(model, tmp_path / "x", plan=file, target=None)
    with pytest.raises(PlanError, match=words):
        compress(replace(asked, runtime=runtime, bits=(4, 8, 16)), lambda event: None)


def test_a_plan_of_an_earlier_version_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    plan = {
        "model_fingerprint": "f", "budget": {"limit_bytes": 1, "asked": "x"}, "allocator": "x",
        "metric": None, "table_digest": None, "choices": {}, "predicted_bytes": 1,
        "predicted_loss": None, "embedding": "w8g64",
    }  # fmt: skip
    file.write_text(json.dumps(plan))
    asked = settings(tmp_path / "no-model", tmp_path / "x", plan=file, target=None)
    with pytest.raises(PlanError, match=r"an earlier cptq wrote it.*now they are units"):
        compress(asked, lambda event: None)


@pytest.mark.parametrize(
    ("dtype", "tied"),
    cover([torch.float16, torch.bfloat16, torch.float32], [True, False], at_once=1),
)
def test_stock_transformers_reads_8_bit_floats(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    """The default runtime stores the vocabulary as 8-bit floats; the reload check compares."""
    names = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model = tiny_model("llama", dtype=dtype, tied=tied)
    asked = settings(model, tmp_path / "out", target="4.5bit", embedding_bits=8)
    done = compress(replace(asked, runtime="transformers"), lambda event: None)
    choices = done.summary.plan.choices
    labels = {n: c.label for n, c in choices.items() if n.split(".")[-1] in names}
    assert len(labels) == len(names)
    assert all(label.startswith("f8") for label in labels.values())
    header = read_header(done.out / "model.safetensors")
    stored = {n: spec.dtype for n, spec in header.items() if n.removesuffix(".weight") in labels}
    assert all(dtype.startswith("F8_") for dtype in stored.values())
    assert len(stored) == len(names)
    assert done.artifact.weight_bytes == done.summary.size.file_bytes
    assert done.artifact.manifest["verification"]["max_abs_difference"] < 1e-4
    again = open_artifact(done.out).content
    for name in labels:
        assert again.compressed[f"{name}.weight"].codes.dtype.itemsize == 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"min_bits": ("head=5",)}, {5, 6, 8, 16}),
        ({"max_bits": ("embedding=4",)}, {3, 4}),
        ({"pins": ("embed_tokens=7bit",)}, {7}),
        ({"min_bits": ("4",), "max_bits": ("5",)}, {4, 5}),
    ],
)
def test_limits_and_pins_hold_for_the_vocabulary(
    tiny_model: TinyModel, tmp_path: Path, options: dict[str, Any], allowed: set[int]
) -> None:
    model = tiny_model("llama", dtype=torch.float16, tied=True)
    asked = settings(model, tmp_path / "out", target="6bit", **options)
    chosen = plan(asked, lambda event: None).choices["model.embed_tokens"]
    assert chosen.bits in allowed


@pytest.mark.parametrize("option", ["embedding_bits", "asymmetric", "sparsity"])
def test_what_a_plan_says_is_not_said_again(option: str) -> None:
    value = {"embedding_bits": 8, "asymmetric": True, "sparsity": "2:4"}[option]
    line = {"model": "m", "runtime": "cptq", "plan": "p.json", option: value}
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} .* --plan"):
        settings_from(CompressSettings, line)
