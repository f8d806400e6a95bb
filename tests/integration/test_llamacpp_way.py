"""`compress --runtime llamacpp`, then `export --format gguf`: nothing is quantized again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from cptq.artifact.reader import open_artifact
from cptq.compression import trial_model
from cptq.config import (
    AnalyzeSettings,
    CalibrationSettings,
    CompressSettings,
    ExportSettings,
    ModelSettings,
)
from cptq.errors import BudgetError, PlanError, UsageError
from cptq.numerics.grid import dequantize_layer
from cptq.pipeline import analyze, compress, export
from cptq.report.summary import AnalyzeOutcome, CompressOutcome
from cptq.types import CompressedLayer
from tests.conftest import TinyModel
from tests.quick import cover
from tests.tiny_models import SENTENCES

pytestmark = pytest.mark.usefixtures("same_process", "short_manual")

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 64, "n_inner": 96, "n_head": 4},
    "llama": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2},
    "bert": {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4},
}
KINDS = {"w4g32": "Q4_0", "w8g32": "Q8_0", "w4g32-asym": "Q4_1", "w5g32-asym": "Q5_1"}
KINDS |= {"w3g16-k": "Q3_K", "w6g16-k": "Q6_K", "w4g32-iq4nl": "IQ4_NL"}
#: whole super-blocks, but for the 96 inputs of down_proj
WIDE = SIZES["llama"] | {"hidden_size": 256, "num_attention_heads": 2, "head_dim": 128}


def compressed(model: Path, out: Path, **options: Any) -> CompressOutcome:
    text = out.parent / "text.txt"
    text.write_text("\n".join(SENTENCES * 20))
    usual = {"allocator": "even", "target": "5.5bit", "bits": (4, 5, 8, 16)}
    asked: dict[str, Any] = usual | options
    return compress(
        CompressSettings(
            model=ModelSettings(model=str(model), device="cpu"),
            calibration=CalibrationSettings(calibration=str(text), samples=4, seqlen=32),
            out=out,
            runtime="llamacpp",
            group_size=32,
            **asked,
        ),
        lambda event: None,
    )


def analyzed(model: Path, out: Path, **options: Any) -> AnalyzeOutcome:
    return analyze(
        AnalyzeSettings(
            model=ModelSettings(model=str(model), device="cpu"),
            calibration=CalibrationSettings(calibration="pydoc", samples=4, seqlen=32),
            out=out,
            runtime="llamacpp",
            group_size=32,
            **options,
        ),
        lambda event: None,
    )


def exported(artifact: Path, out: Path) -> gguf.GGUFReader:
    export(ExportSettings(artifact=artifact, format="gguf", out=out), lambda event: None)
    return gguf.GGUFReader(next(out.glob("*.gguf")))


@pytest.mark.parametrize(
    ("arch", "asymmetric", "dtype"),
    cover(["gpt2", "bert", "llama"], [False, True], [torch.bfloat16, torch.float32], at_once=1),
)
def test_a_mixed_plan_comes_out_bit_for_bit(
    tiny_model: TinyModel, tmp_path: Path, arch: str, asymmetric: bool, dtype: torch.dtype
) -> None:
    source = tiny_model(arch, dtype=dtype, **SIZES[arch])
    levels = "even" if dtype is torch.float32 else "auto"
    done = compressed(source, tmp_path / "out", asymmetric=asymmetric, bits=(4, 8), levels=levels)
    assert done.artifact.manifest["form"] == "packed"
    content = open_artifact(done.out).content
    labels = {layer.result.candidate.label for layer in content.compressed.values()}
    symmetric = "w4g32" if levels == "even" else "w4g32-iq4nl"
    assert labels == ({"w4g32-asym", "w8g32"} if asymmetric else {symmetric, "w8g32"})
    said = [n.message for n in done.summary.notices if n.subject == "--asymmetric"]
    assert said == ["w8g32 stay symmetric: llamacpp has no other"] * asymmetric
    planned = {spec.name for unit in done.summary.units for spec in unit.layers}
    assert planned == {layer.spec.name for layer in content.compressed.values()}
    assert (arch == "gpt2") == any(layer.spec.transposed for layer in content.compressed.values())
    reader = exported(done.out, tmp_path / "gguf")
    found = sorted(_sums(reader, {KINDS[label] for label in labels}))
    assert found == sorted(
        _sum(dequantize_layer(x, torch.float64).numpy()) for x in content.compressed.values()
    )


@pytest.mark.parametrize(
    ("arch", "asymmetric", "dtype"),
    cover(["llama", "gpt2"], [False, True], [torch.float32, torch.bfloat16], at_once=1),
)
def test_an_embedding_comes_out_as_q8_0(
    tiny_model: TinyModel, tmp_path: Path, arch: str, asymmetric: bool, dtype: torch.dtype
) -> None:
    """Smaller than the dense one, counted by the budget, and not rounded again."""
    source = tiny_model(arch, dtype=dtype, **SIZES[arch])
    done = compressed(
        source,
        tmp_path / "out",
        asymmetric=asymmetric,
        bits=(4, 8),
        embedding_bits=8,
        target="7bit",
    )
    assert done.artifact.manifest["form"] == "packed"
    content = open_artifact(done.out).content
    name = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}[arch]
    reader = exported(done.out, tmp_path / "gguf")
    assert done.artifact.manifest["plan"]["choices"][name.removesuffix(".weight")] == "w8g32"
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    assert tensor.tensor_type.name == "Q8_0"
    found = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
    assert np.array_equal(found, dequantize_layer(content.compressed[name], torch.float64).numpy())


def test_a_vocabulary_is_measured_at_what_other_runtimes_take(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """8-bit floats have a score, though no block of ggml holds them."""
    source = tiny_model("llama", **SIZES["llama"])
    done = analyzed(source, tmp_path / "out", metrics=("output",), bits=(4, 8, 16))
    table = done.summary.sensitivity["output"]
    found = {candidate.label for candidate in table.scores["model.embed_tokens"]}
    assert {"w4g32-iq4nl", "w8g32", "w16"} < found
    assert any(label.startswith("f8") for label in found)


@pytest.mark.parametrize("command", ["compress --refine", "analyze --validate"])
def test_plans_are_tried_with_the_scales_that_are_shipped(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    flags: list[bool] = []
    real = trial_model.compress_layer

    def recording(*args: Any, float16_scales: bool, **more: Any) -> CompressedLayer:
        flags.append(float16_scales)
        return real(*args, float16_scales=float16_scales, **more)

    monkeypatch.setattr(trial_model, "compress_layer", recording)
    source = tiny_model("llama", **SIZES["llama"])
    if command == "compress --refine":
        compressed(source, tmp_path / "out", refine=2)
    else:
        judged = {"targets": ("5bit",), "pairs": 4, "validate": True}
        analyzed(source, tmp_path / "out", metrics=("pq-index",), bits=(4, 5, 8, 16), **judged)
    assert flags
    assert all(flags)


def test_an_embedding_that_no_block_holds_stays_dense_and_that_is_said(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """Its 48 values per token are no blocks of 32; nor are those of most layers."""
    source = tiny_model("llama", dtype=torch.float16, hidden_size=48, intermediate_size=96)
    done = compressed(source, tmp_path / "out", embedding_bits=8, target="15bit")
    assert done.artifact.manifest["form"] == "packed"
    said = [n.message for n in done.summary.notices if n.subject == "model.embed_tokens"]
    assert any("llamacpp takes inputs that 32 divides, and this is 300 x 48" in m for m in said)


@pytest.mark.parametrize(
    ("arch", "dtype"), cover(["llama", "gpt2", "bert"], [torch.float32, torch.bfloat16], at_once=1)
)
def test_a_target_counts_the_gguf(
    tiny_model: TinyModel, tmp_path: Path, arch: str, dtype: torch.dtype
) -> None:
    """To the byte: vocabulary, padding and what llama.cpp does without."""
    source = tiny_model(arch, dtype=dtype, **SIZES[arch])
    done = compressed(source, tmp_path / "out", asymmetric=True)
    exported(done.out, tmp_path / "gguf")
    nbytes = next((tmp_path / "gguf").glob("*.gguf")).stat().st_size
    assert done.summary.size.file_bytes == done.summary.plan.predicted_bytes == nbytes
    assert nbytes <= done.summary.plan.budget.limit_bytes
    labels = {choice.label for choice in done.summary.plan.choices.values()}
    assert len(labels) > 1


def test_a_target_below_what_blocks_can_do_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", dtype=torch.float16, **SIZES["llama"])
    with pytest.raises(BudgetError, match="the target 3bit is below the smallest plan"):
        compressed(source, tmp_path / "out", target="3bit")


def test_widths_that_no_layer_can_have_are_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = tiny_model("llama", **SIZES["llama"])
    with pytest.raises(
        UsageError, match=r"--bits names 3, 6, .* whose inputs 256 divides"
    ) as found:
        compressed(source, tmp_path / "out", bits=(3, 6, 16))
    assert found.value.allowed == "--bits with one of 4, 5, 8"


@pytest.mark.parametrize(
    ("dtype", "inner"), cover([torch.float32, torch.bfloat16], [512, 96], at_once=1)
)
def test_a_plan_of_k_types_is_read_by_gguf_and_by_transformers(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype, inner: int
) -> None:
    source = tiny_model("llama", dtype=dtype, **(WIDE | {"intermediate_size": inner}))
    target = {512: "3.9bit", 96: "4.4bit"}[inner]
    options = {"bits": (3, 4, 6), "pins": ("q_proj=6bit",)}
    done = compressed(source, tmp_path / "out", target=target, **options)
    content = open_artifact(done.out).content
    choices = {unit: choice.label for unit, choice in done.summary.plan.choices.items()}
    assert set(choices.values()) == {"w3g16-k", "w4g32-iq4nl", "w6g16-k"}
    said = [n.message for n in done.summary.notices if n.message.startswith("some --bits left out")]
    why = f"some --bits left out: {inner} inputs, which super-blocks of 256 do not divide"
    assert said == [why] * (inner == 96)
    assert ({choices[f"model.layers.{i}.mlp.down_proj"] for i in (0, 1)} == {"w4g32-iq4nl"}) == (
        inner == 96
    )
    reader = exported(done.out, tmp_path / "gguf")
    file = next((tmp_path / "gguf").glob("*.gguf"))
    assert file.stat().st_size == done.summary.plan.predicted_bytes
    assert done.summary.plan.predicted_bytes <= done.summary.plan.budget.limit_bytes
    wanted = {n: dequantize_layer(x, torch.float32) for n, x in content.compressed.items()}
    found = sorted(_sums(reader, {KINDS[label] for label in choices.values()}))
    assert found == sorted(_sum(value.double().numpy()) for value in wanted.values())
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    for name, value in wanted.items():
        assert torch.equal(read[name], value)


def test_a_pin_to_a_super_block_is_taken_or_refused_by_name(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", dtype=torch.float16, **WIDE)
    options: dict[str, Any] = {"bits": (4, 8), "target": "7bit"}
    done = compressed(source, tmp_path / "out", pins=("q_proj=6bit",), **options)
    labels = {u: c.label for u, c in done.summary.plan.choices.items()}
    assert labels["model.layers.0.self_attn.qkv"] == "w6g16-k"
    with pytest.raises(PlanError, match="down_proj is pinned to w3g16-k: 96 inputs"):
        compressed(source, tmp_path / "again", pins=("down_proj=3bit",), **options)
    options |= {"scales": "16bit", "pins": ("q_proj=6bit",)}
    with pytest.raises(PlanError, match="takes k scales, in groups of 16, at 6 bits"):
        compressed(source, tmp_path / "again", **options)


def _sums(reader: gguf.GGUFReader, kinds: set[str]) -> list[tuple[float, ...]]:
    return [
        _sum(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64))
        for tensor in reader.tensors
        if tensor.tensor_type.name in kinds
    ]


def _sum(weight: np.ndarray) -> tuple[float, ...]:
    """All values, sorted: whatever the order of rows."""
    return tuple(np.sort(weight.ravel()).tolist())


def test_a_plan_edited_to_a_width_without_a_block_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("gpt2", dtype=torch.float16, **SIZES["gpt2"])
    first = compressed(source, tmp_path / "out", asymmetric=True, bits=(4, 5))
    plan = json.loads((first.out / "plan.json").read_text())
    plan["choices"][next(iter(plan["choices"]))] = "w8g32-asym"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan))
    with pytest.raises(PlanError, match=r"gguf .asymmetric codes of 8 bits, but of 4, 5"):
        compressed(source, tmp_path / "again", asymmetric=True, plan=file, target=None)


def test_a_pin_beyond_the_asymmetric_widths_is_symmetric(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = tiny_model("llama", dtype=torch.float16, **SIZES["llama"])
    options = {"asymmetric": True, "bits": (4, 16), "pins": ("layers.0=8bit", "layers.1=5bit")}
    done = compressed(source, tmp_path / "out", target="9bit", **options)
    layers = open_artifact(done.out).content.compressed
    labels = [
        layers[f"model.layers.{block}.self_attn.q_proj.weight"].result.candidate.label
        for block in range(2)
    ]
    assert labels == ["w8g32", "w5g32-asym"]
