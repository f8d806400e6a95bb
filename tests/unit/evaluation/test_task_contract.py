"""What every task promises: prepared without weights, checked for leaks, then measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from cptq.checkpoint.loader import load_model, read_spec
from cptq.config import ModelSettings
from cptq.data.glue_layouts import GLUE_TASKS
from cptq.data.overlap import hash_row
from cptq.errors import DataError, EvaluationError
from cptq.evaluation import TASK_KINDS, TASKS
from cptq.evaluation.leak_check import CalibrationText, check_leaks
from cptq.evaluation.task import EvalOptions, evaluate, prepare_task
from cptq.types import EvalResult
from tests.unit.evaluation.test_footprint import NUMBERS

ARCHITECTURES = {"causal-lm": "llama", "classifier": "bert", "encoder": "bert-encoder"}
ARCHITECTURES["masked-lm"] = "bert-mlm"
CASES = [(name, kind) for name in TASKS for kind in TASK_KINDS[name]]
CASES += [("text:", "causal-lm"), ("rolled:", "causal-lm")]
#: tasks of GLUE that others here stand for: all are computed by hand in `test_glue_all`
GLUE = ("sst2", "mrpc", "qqp", "mnli-mm", "mnli_mismatch", "qnli", "rte", "wnli")
QUICK = [case for case in CASES if case[0].removeprefix("glue/") not in GLUE]
QUICK = [case for case in QUICK if case[0] != "glue/stsb-test" or case[1] == "encoder"]


def build_model(tiny_model: Callable[..., Path], task: str, kind: str, place: Path) -> Path:
    """A checkpoint of its own that can do the task."""
    known = GLUE_TASKS.get(task.removeprefix("glue/").removesuffix("-test"))
    labels = (
        {"num_labels": max(len(known.label_names), 1)} if known and kind == "classifier" else {}
    )
    shutil.copytree(tiny_model(ARCHITECTURES[kind], **labels), place)
    return place


@pytest.mark.parametrize(
    ("task", "kind"),
    [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
)
def test_a_task_is_prepared_without_weights_checked_and_measured(
    tiny_model, heard, every_data: Path, file: str, tmp_path: Path, monkeypatch, task, kind
) -> None:
    path = build_model(tiny_model, task, kind, tmp_path / "model")
    settings = ModelSettings(model=str(path), device="cpu")
    options = EvalOptions(data_dir=every_data, seqlen=32)
    name = {"text:": f"text:{file}", "rolled:": f"text:{file}"}.get(task, task)
    options = replace(options, stride=8) if task == "rolled:" else options

    weights, aside = path / "model.safetensors", tmp_path / "aside"
    spec = read_spec(settings, heard)
    weights.rename(aside)
    prepared = prepare_task(spec, name, options, heard)
    assert prepared.name == name
    assert not hasattr(spec, "module")
    with pytest.raises(FrozenInstanceError):
        prepared.name = "another"

    documents = prepared.documents
    assert set(documents) == (set() if task == "footprint" else {name})
    for rows in documents.values():
        assert all(isinstance(row, str) for row in rows)
        assert any(row.strip() for row in rows)
        sketch = np.unique(np.concatenate([hash_row(row) for row in rows]))
        calibration = CalibrationText(name="a.txt", sketch=sketch)
        with pytest.raises(EvaluationError, match=r"a\.txt"):
            check_leaks(prepared, calibration, strict=True, emit=heard)

    aside.rename(weights)
    answer = Namespace(stdout=json.dumps(NUMBERS))  # of the process that measures footprints
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    results = prepared.measure(load_model(settings, heard), options, heard)
    assert results
    assert all(isinstance(result, EvalResult) for result in results)
    assert {result.data_fingerprint for result in results} == {prepared.fingerprint}
    if task != "footprint":
        assert {result.task for result in results} == {name}
        assert {len(result.per_sample or ()) for result in results} == {results[0].samples}


def test_what_is_prepared_from_a_spec_and_from_a_loaded_model_is_the_same(
    load, heard, tiny_model, every_data: Path
) -> None:
    options = EvalOptions(data_dir=every_data, seqlen=32)
    for arch, task in (("llama", "wikitext-rolling"), ("llama", "piqa"), ("bert", "glue/sst2")):
        settings = ModelSettings(model=str(tiny_model(arch)), device="cpu")
        model = load(arch)
        prepared = prepare_task(read_spec(settings, heard), task, options, heard)
        mine, theirs = (
            prepared.measure(model, options, heard),
            evaluate(model, task, options, heard),
        )
        assert [replace(r, seconds=0) for r in mine] == [replace(r, seconds=0) for r in theirs]


def test_a_spec_says_what_the_loaded_model_does(heard, tiny_model) -> None:
    for arch in ("llama", "gpt2", "roberta", "mpnet", "bert-encoder"):
        settings = ModelSettings(model=str(tiny_model(arch)), device="cpu")
        spec, model = read_spec(settings, heard), load_model(settings, heard)
        for name in ("source", "path", "kind", "family", "max_positions"):
            assert getattr(spec, name) == getattr(model, name)
        assert spec.config.to_dict() == model.config.to_dict() | {
            "dtype": spec.config.to_dict()["dtype"]
        }


def test_errors_come_before_a_model_is_loaded(heard, tiny_model, every_data: Path) -> None:
    spec = read_spec(ModelSettings(model=str(tiny_model("llama")), device="cpu"), heard)
    options = EvalOptions(data_dir=every_data)
    cases: dict[str, EvalOptions] = {
        "wikitext": replace(options, seqlen=257),  # more than the positions
        "wikitext-rolling": replace(options, seqlen=16, stride=17),
        "piqa": replace(options, seqlen=2),  # an answer is longer
        "glue/sst2": options,  # for another kind of model
    }
    for task, wrong in cases.items():
        with pytest.raises(EvaluationError):
            prepare_task(spec, task, wrong, heard)
    with pytest.raises(EvaluationError, match="tokenizer"):
        prepare_task(replace(spec, tokenizer=None), "ptb", options, heard)
    with pytest.raises(DataError):
        prepare_task(spec, "ptb", replace(options, data_dir=every_data / "absent"), heard)
