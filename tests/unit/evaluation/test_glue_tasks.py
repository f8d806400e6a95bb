from __future__ import annotations

import copy
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cptq.errors import EvaluationError
from cptq.evaluation.task import EvalOptions, evaluate

POSITIVE = [1, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 0]  # what the oracle below says
LABELS = [1, 1, 1, 0, 0, 0, 1, 1, 1, 0, 1, 1]  # 6 TP, 3 TN, 1 FP, 2 FN


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """Twelve sentences: "Yes ..." where the oracle says 1, longer and longer."""
    said = [("Yes" if p else "No") + " and so on" * i for i, p in enumerate(POSITIVE)]
    rows = list(zip(said, LABELS, strict=True))
    sst2 = ["sentence\tlabel", *(f"{s}\t{label}" for s, label in rows)]
    cola = [f"src\t{label}\t\t{s}" for s, label in rows]
    stsb = ["sentence1\tsentence2\tscore", *(f"Yes{' a' * i}\tNo{' b' * i}\t{i}" for i in range(6))]
    for folder, lines in {"SST-2": sst2, "CoLA": cola, "STS-B": stsb}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "dev.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


class Oracle(nn.Module):
    """Answers by the first letter of the sentence, or with its length."""

    def __init__(self, yes: int, outputs: int, flip: bool = False) -> None:
        super().__init__()
        self.yes, self.outputs, self.flip = yes, outputs, flip

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        if self.outputs == 1:
            return SimpleNamespace(logits=attention_mask.sum(1, keepdim=True).float())
        is_yes = (input_ids[:, 1] == self.yes) ^ self.flip
        return SimpleNamespace(logits=nn.functional.one_hot(is_yes.long(), 2).float())


def oracle(load, outputs: int = 2, names: tuple[str, ...] = (), flip: bool = False):
    model = load("bert")
    yes = model.tokenizer("Yes")["input_ids"][1]
    names = names or tuple(f"LABEL_{i}" for i in range(outputs))
    config = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(names))
    return replace(model, module=Oracle(yes, outputs, flip), config=config)


def test_sst2_is_the_hand_made_accuracy(load, heard, glue: Path) -> None:
    (found,) = evaluate(oracle(load), "glue/sst2", EvalOptions(data_dir=glue), heard)
    assert (found.metric, found.value, found.samples) == ("accuracy", 9 / 12, 12)
    assert found.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 12))
    assert found.higher_is_better
    assert any("LABEL_0, LABEL_1" in message for message in heard.notices)


def test_cola_is_the_hand_made_matthews(load, heard, glue: Path) -> None:
    found = evaluate(oracle(load), "glue/cola", EvalOptions(data_dir=glue), heard)
    assert [r.metric for r in found] == ["matthews", "accuracy"]
    assert found[0].value == pytest.approx((6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5))
    assert found[1].value == 9 / 12


def test_outputs_in_another_order_are_read_by_their_names(load, heard, glue: Path) -> None:
    model = oracle(load, names=("positive", "negative"), flip=True)
    (found,) = evaluate(model, "glue/sst2", EvalOptions(data_dir=glue), heard)
    assert found.value == 9 / 12


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_first_samples_of_a_limit_in_the_order_of_the_file(
    load, heard, glue: Path, batch_size: int
) -> None:
    options = EvalOptions(data_dir=glue, limit=7, batch_size=batch_size)
    (found,) = evaluate(oracle(load), "glue/sst2", options, heard)
    assert (found.value, found.samples) == (5 / 7, 7)


def test_stsb_by_a_regressor(load, heard, glue: Path) -> None:
    """The score is the length, which grows with the label."""
    found = evaluate(oracle(load, 1), "glue/stsb", EvalOptions(data_dir=glue), heard)
    assert [r.metric for r in found] == ["pearson", "spearman"]
    assert [r.value for r in found] == pytest.approx([1, 1])


def test_stsb_by_the_cosine_of_an_encoder(load, heard, glue: Path) -> None:
    model = load("bert-encoder")
    found = evaluate(model, "glue/stsb", EvalOptions(data_dir=glue, batch_size=5), heard)
    assert [r.metric for r in found] == ["spearman", "pearson"]
    similarities = []
    for i in range(6):
        vectors = []
        for text in (f"Yes{' a' * i}", f"No{' b' * i}"):
            out = model.module(**model.tokenizer(text, return_tensors="pt"))
            vectors.append(out.last_hidden_state[0].mean(0))
        similarities.append(torch.cosine_similarity(*vectors, dim=0).item())
    stacked = torch.tensor([similarities, list(range(6))])
    assert found[1].value == pytest.approx(torch.corrcoef(stacked)[0, 1].item(), abs=1e-5)
    assert found[0].notes == (
        "cosine of embeddings, pooling mean, at most 128 tokens",
        "standard error: bootstrap, 500 resamples",
    )


def test_stsb_of_a_masked_language_model_uses_its_body(load, heard, glue: Path) -> None:
    found = evaluate(load("bert-mlm"), "glue/stsb", EvalOptions(data_dir=glue), heard)
    assert all(math.isfinite(result.value) for result in found)


def test_constant_predictions_are_said(load, heard, glue: Path) -> None:
    model = oracle(load)
    model.module.yes = -1
    found = evaluate(model, "glue/cola", EvalOptions(data_dir=glue), heard)
    assert found[0].value == 0
    assert any("12 predictions" in message for message in heard.notices)


def test_mismatches_are_refused(load, heard, glue: Path) -> None:
    options = EvalOptions(data_dir=glue)
    with pytest.raises(EvaluationError, match="3 labels"):
        evaluate(oracle(load, 3), "glue/sst2", options, heard)
    with pytest.raises(EvaluationError, match="2 outputs"):
        evaluate(oracle(load), "glue/stsb", options, heard)
    with pytest.raises(EvaluationError, match="causal-lm"):
        evaluate(load("bert"), "wikitext", options, heard)
    with pytest.raises(EvaluationError, match="classifier"):
        evaluate(load("llama"), "glue/sst2", options, heard)


def test_cut_samples_are_in_the_notes(load, heard, glue: Path) -> None:
    options = EvalOptions(data_dir=glue, max_length=8)
    (found,) = evaluate(oracle(load), "glue/sst2", options, heard)
    assert found.notes[0].endswith("samples cut at 8 tokens")


@pytest.mark.slow
def test_minilm_on_sst2(load, heard, minilm_sst2: Path, data_dir: Path) -> None:
    (found,) = evaluate(load(minilm_sst2), "glue/sst2", EvalOptions(data_dir=data_dir), heard)
    assert (found.value, found.samples) == (750 / 872, 872)


@pytest.mark.slow
def test_all_minilm_on_stsb(load, heard, data_dir: Path) -> None:
    directory = os.environ.get("CPTQ_MINILM")
    if not directory:
        pytest.skip("CPTQ_MINILM names no directory of all-MiniLM-L6-v2")
    found = evaluate(load(Path(directory)), "glue/stsb", EvalOptions(data_dir=data_dir), heard)
    assert found[0].value == pytest.approx(0.8673, abs=5e-5)
