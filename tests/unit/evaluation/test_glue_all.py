"""Every task of GLUE against one sentence at a time and the libraries' own metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from cptq.data import load_glue
from cptq.data.glue_layouts import GLUE_TASKS
from cptq.errors import EvaluationError
from cptq.evaluation.task import EvalOptions, evaluate
from cptq.evaluation.tasks.glue import REPORTED, SYNONYMS, match_labels
from cptq.types import SamplePairs
from tests.unit.evaluation.task_data import SAMPLES, write_glue

CLASSES = [task for task, layout in GLUE_TASKS.items() if layout.label_names]
LIBRARY = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": lambda a, b: pearsonr(a, b).statistic,
    "spearman": lambda a, b: spearmanr(a, b).statistic,
}


def one_at_a_time(model, sentences) -> np.ndarray:
    with torch.inference_mode():
        rows = [model.tokenizer(*texts, return_tensors="pt") for texts in sentences]
        return np.stack([model.module(**row).logits[0].double().numpy() for row in rows])


@pytest.mark.parametrize("task", GLUE_TASKS)
def test_a_task_is_what_the_libraries_make_of_single_sentences(
    load, heard, tmp_path: Path, task: str
) -> None:
    names = GLUE_TASKS[task].label_names
    model = load("bert", num_labels=max(len(names), 1))
    found = load_glue(task, "dev", data_dir=write_glue(tmp_path, task))
    logits = one_at_a_time(model, found.sentences)
    expected = logits.argmax(1) if names else logits[:, 0]
    for batch_size, side in ((1, "right"), (5, "left"), (64, "right")):
        model.tokenizer.padding_side = side
        options = EvalOptions(data_dir=tmp_path, batch_size=batch_size)
        results = evaluate(model, f"glue/{task}", options, heard)
        assert tuple(r.metric for r in results) == REPORTED[f"glue/{task}"]
        for result in results:
            library = LIBRARY[result.metric](found.labels, expected)
            assert result.value == pytest.approx(library, abs=1e-5)
            assert result.samples == SAMPLES == len(result.per_sample)
            assert result.data_fingerprint == found.sha256
            assert "standard error: " in result.notes[-1]
            if isinstance(result.per_sample, SamplePairs):
                assert result.per_sample.predictions == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("task", CLASSES)
def test_the_label_names_of_a_task_are_known_in_any_order(heard, task: str) -> None:
    names = GLUE_TASKS[task].label_names
    assert tuple(spellings[0] for spellings in SYNONYMS[f"glue/{task}"]) == names

    turned = enumerate(name.replace("_", "-").upper() for name in reversed(names))
    config = SimpleNamespace(num_labels=len(names), id2label=dict(turned))
    order = match_labels(config, f"glue/{task}", names, heard)
    assert order == list(range(len(names)))[::-1]
    assert not heard


def test_an_inference_model_with_other_labels_is_refused(load, heard, tmp_path: Path) -> None:
    write_glue(tmp_path, "mnli")
    model = load("bert", num_labels=2, id2label={0: "entailment", 1: "not_entailment"})
    with pytest.raises(EvaluationError) as caught:
        evaluate(model, "glue/mnli", EvalOptions(data_dir=tmp_path), heard)
    assert "2 labels (entailment, not_entailment)" in caught.value.problem
    assert caught.value.allowed == "3 for glue/mnli (entailment, neutral, contradiction)"


def test_labels_without_names_are_a_warning(load, heard, tmp_path: Path) -> None:
    write_glue(tmp_path, "mnli")
    evaluate(load("bert", num_labels=3), "glue/mnli", EvalOptions(data_dir=tmp_path), heard)
    warnings = [event.message for event in heard if getattr(event, "kind", "") == "warning"]
    named = ("LABEL_0, LABEL_1, LABEL_2", "entailment, neutral, contradiction")
    assert any(all(names in message for names in named) for message in warnings)


def test_the_test_part_of_stsb(load, heard, tmp_path: Path) -> None:
    folder = tmp_path / "STS-B" / "original"
    folder.mkdir(parents=True)
    rows = [f"g\tf\ty\t{i}\t{i % 5}.5\tA small dog {i}.\tA cat {i * i}." for i in range(9)]
    (folder / "sts-test.tsv").write_text("\n".join(rows))
    model = load("bert", num_labels=1)
    found = evaluate(model, "glue/stsb-test", EvalOptions(data_dir=tmp_path), heard)
    assert [(r.metric, r.samples) for r in found] == [("pearson", 9), ("spearman", 9)]
    assert found[0].data_source == str(folder / "sts-test.tsv")


def test_batches_and_padding_change_no_embedding(load, heard, tmp_path: Path) -> None:
    write_glue(tmp_path, "stsb")
    model = load("bert-encoder")
    values = []
    for batch_size, side in ((1, "right"), (7, "left"), (64, "left")):
        model.tokenizer.padding_side = side
        options = replace(EvalOptions(data_dir=tmp_path), batch_size=batch_size)
        (first, _) = evaluate(model, "glue/stsb", options, heard)
        values.append((first.value, *first.per_sample.predictions))
    for other in values[1:]:
        assert other == pytest.approx(values[0], abs=1e-5)
