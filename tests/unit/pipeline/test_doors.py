"""What is told or refused before any work: size, loadability, padding; what inspect foresees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import cptq
from cptq.calibration.replay import forward
from cptq.checkpoint.loader import load_model
from cptq.config import CalibrationSettings, CompressSettings, ModelSettings
from cptq.errors import BudgetError, CalibrationError, ModelError
from cptq.pipeline.compress import compress
from cptq.pipeline.inputs import CompressInputs, load_inputs
from cptq.pipeline.recorder import Recorder
from tests.conftest import Heard, TinyModel
from tests.tiny_models import RECIPES, SENTENCES, tiny_tokenizer
from tests.unit.checkpoint.made import copied, edit_config

pytestmark = pytest.mark.usefixtures("same_process")

#: sizes of families that stock transformers does not load compressed -> the way that loads them
UNLOADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "gpt_bigcode": (
        {"n_embd": 48, "n_inner": 80, "n_head": 3, "n_layer": 2, "n_positions": 256},
        "--runtime cptq, which loads it",
    ),
    "mamba": (
        {"hidden_size": 48, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
        "--runtime cptq, which loads it",
    ),
    "recurrent_gemma": (
        {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "head_dim": 16}
        | {"num_key_value_heads": 1, "num_hidden_layers": 3, "lru_width": 48},
        "--runtime cptq, which loads it",
    ),
    "rwkv": (
        {"hidden_size": 48, "attention_hidden_size": 48, "num_hidden_layers": 2},
        "--runtime cptq, which loads it",
    ),
}


def settings(model: Path, out: Path, **more: Any) -> CompressSettings:
    text = out.parent / "sentences.txt"
    text.write_text("\n\n".join(SENTENCES * 8))
    calibration = CalibrationSettings(calibration=str(text), samples=4, seqlen=32)
    wanted: dict[str, Any] = {"calibration": calibration, "group_size": 16, **more}
    return CompressSettings(model=ModelSettings(model=str(model)), out=out, **wanted)


def inputs(heard: Heard, *words: Any, **more: Any) -> CompressInputs:
    return load_inputs(settings(*words, **more), Recorder(heard))


def build_family(path: Path, name: str, sizes: dict[str, Any]) -> Path:
    config = AutoConfig.for_model(name, vocab_size=300, pad_token_id=0, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny_tokenizer(causal=True).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "name",
    [n if n == "gpt_bigcode" else pytest.param(n, marks=pytest.mark.slow) for n in UNLOADABLE],
)
def test_what_its_loader_does_not_open_is_refused_before_any_text_is_read(
    name: str, tmp_path: Path, heard: Heard
) -> None:
    sizes, way = UNLOADABLE[name]
    path = build_family(tmp_path / "model", name, sizes)
    with pytest.raises(ModelError, match=f"stock transformers reads .*ForCausalLM.*{way}"):
        inputs(heard, path, tmp_path / "out")
    assert not {"calibration", "samples"} & heard.stages


@pytest.mark.slow
@pytest.mark.parametrize("name", UNLOADABLE)
def test_the_trial_is_right_about_the_runtime_that_it_names(name: str, tmp_path: Path) -> None:
    sizes, way = UNLOADABLE[name]
    path = build_family(tmp_path / "model", name, sizes)
    bits = 16 if "16" in way else None
    more: dict[str, Any] = {"allocator": "uniform", "compressor": "nearest"}
    given = settings(path, tmp_path / "out", runtime="cptq", embedding_bits=bits, **more)
    assert compress(given, lambda event: None).summary.verification is not None


def test_a_family_without_a_name_that_loads_is_tried_and_taken(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    assert inputs(heard, tiny_model("generic"), tmp_path / "out").calibration.tokens
    assert not [notice for notice in heard.notices if "could not be tried" in notice]


def test_a_result_larger_than_the_model_is_refused_unless_asked_for(
    tiny_model: TinyModel, tmp_path: Path, heard: Heard
) -> None:
    half = tiny_model("llama", dtype=torch.float16)
    size = (half / "model.safetensors").stat().st_size
    with pytest.raises(BudgetError, match=rf"the target 8bit allows .* has {size:,}.*--allow-larg"):
        inputs(heard, half, tmp_path / "out", target="8bit", group_size=1)
    found = inputs(heard, half, tmp_path / "out", target="8bit", group_size=1, allow_larger=True)
    assert found.need > size
    assert any(f"{found.need:,} bytes" in notice for notice in heard.notices)
    # as large as the model itself, or 16-bit scales beside float32, is not larger
    assert inputs(heard, half, tmp_path / "out", target="16bit").need >= size
    assert inputs(heard, tiny_model("llama"), tmp_path / "out", group_size=1).need < 2 * size


@pytest.fixture
def unpadded(tmp_path: Path) -> Path:
    """A Llama that classifies, with no padding token in its config or its tokenizer."""
    sizes = {key: RECIPES["llama"].config[key] for key in RECIPES["llama"].config}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=300, num_labels=2, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer = tiny_tokenizer(causal=True)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_classifier_without_padding_token_sees_every_row_as_stock_does(
    unpadded: Path, tmp_path: Path, heard: Heard
) -> None:
    found = inputs(heard, unpadded, tmp_path / "out")
    assert any("no padding token" in notice for notice in heard.notices)
    stock = AutoModelForSequenceClassification.from_pretrained(unpadded).eval()
    (batch,) = found.calibration.batches
    lengths = batch["attention_mask"].sum(1).tolist()
    with torch.no_grad():
        logits = forward(found.model, batch).logits
        alone = [
            stock(input_ids=row[None, :length]).logits[0]
            for row, length in zip(batch["input_ids"], lengths, strict=True)
        ]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_rows_that_end_in_the_token_that_pads_are_refused(
    unpadded: Path, tmp_path: Path, heard: Heard
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{line}<pad>" for line in SENTENCES * 4))
    calibration = CalibrationSettings(calibration=str(text), samples=4, seqlen=200)
    with pytest.raises(CalibrationError, match="no pad_token_id"):
        inputs(heard, unpadded, tmp_path / "out", calibration=calibration)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "qwen3_moe", "generic"])
def test_inspect_foresees_what_is_found_when_the_model_is_loaded(
    arch: str, tiny_model: TinyModel, heard: Heard
) -> None:
    path = tiny_model(arch)
    model = load_model(ModelSettings(model=str(path)), heard, conv1d=True, experts=True, dense=True)
    found = cptq.inspect(path).prospect
    assert found is not None
    assert found.refusal is None
    taken = {unit.layers[0].name for unit in model.vocabulary}
    packed = sum(spec.numel * 4 for spec in model.layers if spec.compressible or spec.name in taken)
    assert sum(part.nbytes for part in found.parts if part.packed) == packed
    assert sum(part.nbytes for part in found.parts) == sum(s.nbytes for s in model.tensors)
    reasons = {s.reason for s in model.layers if s.reason and s.name not in taken and not s.tied_to}
    assert reasons <= {part.fate for part in found.parts if not part.packed}
    groups = [unit for unit in model.units if len(unit.layers) > 1]
    assert {name: count for name, (_, count) in found.groups.items()} == {
        unit.role: sum(other.role == unit.role for other in groups) for unit in groups
    }
    takes = {name for name, (yes, _) in found.runtimes.items() if yes}
    wanted = {"gpt2": {"cptq"}, "qwen3_moe": {"transformers"}}
    assert takes == wanted.get(arch, {"transformers", "cptq"})


def test_inspect_says_what_compress_would_refuse(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = copied(tiny_model("llama"), tmp_path / "model")
    edit_config(path, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    found = cptq.inspect(path)
    assert found.prospect is not None
    assert re.search(r"compressed already \(AWQ\)", str(found.prospect.refusal))
    assert found.nbytes == (path / "model.safetensors").stat().st_size
