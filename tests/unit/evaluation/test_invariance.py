"""What must not change a result: batch size, padding side, a missing padding token, the device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cptq.evaluation.task import EvalOptions, evaluate
from tests.tiny_models import SENTENCES

TASKS = [("llama", "text"), ("opt", "rolled"), ("gpt2", "piqa"), ("llama", "sst2")]
TASKS += [("bert", "glue/sst2"), ("bert-encoder", "glue/stsb")]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts, questions and sentences of very different lengths."""
    rows = [s[: 3 + 11 * i] for i, s in enumerate(SENTENCES)]
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    for folder in ("piqa", "SST-2", "STS-B"):
        (tmp_path / folder).mkdir()
    questions = [{"goal": row, "sol1": row[::-1], "sol2": "no", "label": 0} for row in rows]
    text = "".join(json.dumps(question) + "\n" for question in questions)
    (tmp_path / "piqa" / "validation.jsonl").write_text(text)
    single = [f"{row}\t{i % 2}" for i, row in enumerate(rows)]
    (tmp_path / "SST-2" / "dev.tsv").write_text("\n".join(["sentence\tlabel", *single]))
    double = [f"{row}\t{rows[-1 - i]}\t{i % 6}" for i, row in enumerate(rows)]
    (tmp_path / "STS-B" / "dev.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *double]))
    return tmp_path


def numbers(model, task: str, data: Path, batch_size: int = 2) -> list[float]:
    """All values, and every sample's part in them."""
    name = f"text:{data / 'a.txt'}" if task in ("text", "rolled") else task
    stride = 7 if task == "rolled" else None
    options = EvalOptions(data_dir=data, batch_size=batch_size, seqlen=40, stride=stride)
    found = evaluate(model, name, options, lambda event: None)
    samples = [result.per_sample for result in found]
    parts = [getattr(part, "numerators", ()) for part in samples]
    parts += [getattr(part, "predictions", ()) for part in samples]
    return [result.value for result in found] + [value for part in parts for value in part]


@pytest.mark.parametrize(("arch", "task"), TASKS)
def test_neither_batch_size_nor_padding_changes_a_result(
    load, data: Path, arch: str, task: str
) -> None:
    model = load(arch)
    alone = pytest.approx(numbers(model, task, data, batch_size=1), rel=1e-5, abs=1e-5)
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        for batch_size in (3, 100):
            assert numbers(model, task, data, batch_size) == alone
    model.tokenizer.pad_token = None
    assert numbers(model, task, data, 3) == alone


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize(("arch", "task"), TASKS)
def test_the_device_changes_no_result(load, data: Path, arch: str, task: str) -> None:
    model = load(arch)
    here = pytest.approx(numbers(model, task, data), rel=1e-5, abs=1e-5)
    moved = replace(model, module=model.module.to("cuda"), device=torch.device("cuda"))
    assert numbers(moved, task, data) == here
