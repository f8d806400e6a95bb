"""The scripts that make models to measure on, in a few steps on a few sentences."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cptq.checkpoint.loader import load_model
from cptq.config import ModelSettings
from cptq.data import load_text
from cptq.errors import CptqError
from cptq.evaluation.task import EvalOptions, evaluate

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


def script(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    if str(SCRIPTS) not in sys.path:
        sys.path.append(str(SCRIPTS))  # as Python has it where it runs one
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "some.txt"
    path.write_text(load_text("pydoc", "calibration").text[:90_000])
    return path


def quiet(event: object) -> None:
    """No one listens."""


@pytest.mark.parametrize("arch", ["opt", "gpt2", "llama"])
def test_a_reference_model_states_what_cptq_eval_finds(
    arch: str, text: Path, tmp_path: Path
) -> None:
    lm = script("train_reference_lm")
    words = ["--arch", arch, "--steps", "3", "--device", "cpu", "--text", str(text)]
    out = tmp_path / "models" / arch
    lm.run(lm.arguments([*words, str(out)]))
    record = json.loads((out / "training.json").read_text())
    assert (record["arch"], record["steps"], record["tokens_seen"]) == (arch, 3, 3 * 8 * 128)
    assert [path.name for path in out.parent.iterdir()] == [arch]  # nothing half made
    model = load_model(ModelSettings(model=str(out), device="cpu"), quiet)
    options = EvalOptions(seqlen=128)
    found = evaluate(model, f"text:{out / 'heldout.txt'}", options, quiet)[0]
    assert found.value == pytest.approx(record["held_out"]["perplexity"], rel=1e-4)
    with pytest.raises(CptqError, match="is already there"):
        lm.run(lm.arguments([*words, str(out)]))


def test_the_families_bring_what_others_lack() -> None:
    lm = script("train_reference_lm")
    small = lm.SIZES["small"]
    models = {
        arch: AutoModelForCausalLM.from_config(lm.config(arch, small))
        for arch in ("opt", "gpt2", "llama")
    }
    kinds = {arch: {type(m).__name__ for m in model.modules()} for arch, model in models.items()}
    assert "Conv1D" in kinds["gpt2"]
    assert "OPTLearnedPositionalEmbedding" in kinds["opt"]
    assert any("ReLU" in kind for kind in kinds["opt"])
    assert models["llama"].config.num_key_value_heads < models["llama"].config.num_attention_heads
    assert any(name.endswith("q_proj.bias") for name, _ in models["opt"].named_parameters())


def test_held_out_text_is_not_trained_on_and_tokenizers_come_back(
    text: Path, tmp_path: Path
) -> None:
    made = script("_reference_models")
    training, held = made.split(text.read_text())
    assert training + held == text.read_text()
    assert 0.04 < len(held) / len(text.read_text()) < 0.06
    tokenizer = made.train_tokenizer(training, made.SIZES["small"])
    tokenizer.save_pretrained(tmp_path)
    made.AutoConfig.for_model("opt").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(held[:500])["input_ids"] == tokenizer(held[:500])["input_ids"]
    assert again.decode(again(held[:500])["input_ids"]) == held[:500]


def test_the_rate_rises_and_falls() -> None:
    lm = script("train_reference_lm")
    assert lm.rate(lm.WARM_UP) == pytest.approx(1)
    assert lm.rate(1) == pytest.approx(lm.FLOOR)
    assert lm.rate(lm.WARM_UP / 2) == pytest.approx(0.5)
    assert [lm.clock(None, 8)(step) for step in (0, 4, 8)] == [0, 0.5, 1]


def test_bad_text_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = script("train_reference_lm")
    monkeypatch.delenv("CPTQ_ASSETS", raising=False)
    cases = {"empty": b" \n", "not UTF-8": b"caf\xe9", "too few": b"a few words\n" * 30}
    for words, content in cases.items():
        (tmp_path / "a.txt").write_bytes(content)
        line = ["--arch", "opt", "--steps", "1", "--text", str(tmp_path / "a.txt")]
        with pytest.raises(CptqError, match=words):
            lm.run(lm.arguments([*line, str(tmp_path / "out")]))
    with pytest.raises(CptqError, match="there is no text to train on"):
        lm.run(lm.arguments(["--arch", "opt", str(tmp_path / "out")]))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.fixture
def cola(tmp_path: Path) -> Path:
    rows = [
        f"x\t{i % 2}\t\t{'She sings' if i % 2 else 'Sing she'} {'well ' * (i % 7)}"
        for i in range(40)
    ]
    (tmp_path / "CoLA").mkdir()
    for part in ("train", "dev"):
        (tmp_path / "CoLA" / f"{part}.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_classifier_has_label_names_and_states_what_cptq_eval_finds(
    tiny_model: Callable[..., Path], cola: Path
) -> None:
    glue = script("make_glue_model")
    encoder, out = tiny_model("bert-encoder"), cola / "made"
    line = [str(encoder), str(out), "--task", "cola", "--epochs", "2", "--device", "cpu"]
    glue.run(glue.arguments([*line, "--data-dir", str(cola)]))
    record = json.loads((out / "training.json").read_text())
    assert (record["steps"], record["examples"], record["of"]) == (4, 40, 40)
    assert all(math.isfinite(row["loss"]) for row in record["loss"])
    model = load_model(ModelSettings(model=str(out), device="cpu", dtype="float32"), quiet)
    assert model.config.id2label == {0: "unacceptable", 1: "acceptable"}
    found = evaluate(model, "glue/cola", EvalOptions(data_dir=cola), quiet)
    assert [row["value"] for row in record["dev"]] == pytest.approx([r.value for r in found])
    with pytest.raises(CptqError, match="is already there"):
        glue.run(glue.arguments([*line, "--data-dir", str(cola)]))


def test_what_is_no_encoder_is_one_sentence(tiny_model, cola: Path) -> None:
    glue = script("make_glue_model")
    line = ["--task", "cola", "--device", "cpu", "--data-dir", str(cola)]
    (cola / "empty").mkdir()
    with pytest.raises(CptqError, match=r"holds no config\.json"):
        glue.run(glue.arguments([str(cola / "empty"), str(cola / "out"), *line]))
    unpadded = cola / "unpadded"
    shutil.copytree(tiny_model("bert-encoder"), unpadded)
    tokenizer = AutoTokenizer.from_pretrained(unpadded)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(unpadded)
    with pytest.raises(CptqError, match="has no padding token"):
        glue.run(glue.arguments([str(unpadded), str(cola / "out"), *line]))
    assert not (cola / "out").exists()


def test_every_sample_is_drawn_once_and_pairs_stay_pairs(tiny_model, cola: Path) -> None:
    glue = script("make_glue_model")
    found = glue.load_glue("cola", "train", data_dir=cola)
    chosen = glue.drawn(found, 33, 0)
    assert len(set(chosen)) == 33
    rows = [i for batch in glue.batches(found, chosen, 1) for i in batch]
    assert sorted(rows) == sorted(chosen)
    pair = glue.GlueSet(
        task="stsb",
        split="train",
        sentences=(("a b", "c"),),
        labels=(2.5,),
        label_names=(),
        origin="",
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("bert-encoder"))
    batch = glue.inputs(tokenizer, pair, [0], "cpu")
    assert batch["input_ids"].tolist() == [tokenizer("a b", "c")["input_ids"]]
    assert torch.equal(batch["labels"], torch.tensor([0.5]))
    assert glue.head_options(pair) == {"num_labels": 1, "problem_type": "regression"}
