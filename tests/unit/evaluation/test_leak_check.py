from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from cptq.calibration.tokens import build_calibration
from cptq.config import CalibrationSettings, ModelSettings
from cptq.data.overlap import build_sketch, decode_sketch
from cptq.errors import EvaluationError
from cptq.evaluation.leak_check import CalibrationText, check_leaks
from cptq.evaluation.task import EvalOptions, prepare_task


@dataclass(frozen=True)
class Shown:
    """A prepared task as far as the leak check reads it."""

    documents: dict[str, Sequence[str]]


def numbered(first: int, last: int) -> str:
    return " ".join(f"word number {i} of this text" for i in range(first, last))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(numbered(0, 300))
    return path


def calibrate(model, text: Path, heard) -> CalibrationText:
    settings = CalibrationSettings(calibration=str(text), samples=4, seqlen=256)
    record = build_calibration(model, settings, ModelSettings(model="m"), heard).record
    return CalibrationText(name=record.origin, sketch=decode_sketch(record.sketch))


def test_a_model_is_prepared_on_its_calibration_text(load, heard, text: Path) -> None:
    model, options = load("llama"), EvalOptions(seqlen=64, limit=40)
    calibration = calibrate(model, text, heard)
    task = prepare_task(model, f"text:{text}", options, heard)
    heard.clear()
    check_leaks(task, calibration, strict=False, emit=heard)
    (notice,) = heard
    assert (notice.kind, notice.subject) == ("warning", f"text:{text}")
    assert "a.txt" in notice.message
    with pytest.raises(EvaluationError, match=r"text a\.txt"):
        check_leaks(task, calibration, strict=True, emit=heard)
    other = text.with_name("b.txt")
    other.write_text(numbered(1000, 1300))
    task = prepare_task(model, f"text:{other}", options, heard)
    heard.clear()
    check_leaks(task, calibration, strict=True, emit=heard)
    assert not heard


@pytest.mark.parametrize("stride", [None, 64])
def test_the_windows_that_a_limit_leaves_out_do_not_count(load, heard, text: Path, stride) -> None:
    model, name = load("llama"), f"text:{text}"
    options = EvalOptions(seqlen=64, limit=2, stride=stride)
    documents = prepare_task(model, name, options, heard).documents
    # the first token of rolling windows predicts, and is not counted among their 64
    count = 128 if stride is None else 129
    ids = model.tokenizer(text.read_text())["input_ids"][:count]
    assert documents == {name: (model.tokenizer.decode(ids),)}


def test_sentences_are_seen_whole_and_a_phrase_is_no_leak(heard) -> None:
    rows = [f"sentence number {i} says nothing new" for i in range(400)]
    calibration = CalibrationText(name="sst2", sketch=build_sketch(rows))
    with pytest.raises(EvaluationError, match="glue/sst2") as caught:
        check_leaks(Shown({"glue/sst2": rows[:40]}), calibration, strict=True, emit=heard)
    assert "--strict" in str(caught.value.hint)
    others = [f"another sentence, {i}, of five words" for i in range(300)]
    check_leaks(Shown({"glue/sst2": others + rows[:1]}), calibration, strict=True, emit=heard)
    (notice,) = heard
    assert (notice.kind, notice.subject) == ("info", "glue/sst2")
    assert "1 of 400 fingerprints" in notice.message


def test_documents_without_text_are_named(heard) -> None:
    calibration = CalibrationText(name="a.txt", sketch=build_sketch([numbered(0, 30)]))
    check_leaks(Shown({"lm-eval/images": ["", " "]}), calibration, strict=True, emit=heard)
    (notice,) = heard
    assert (notice.kind, notice.subject) == ("skipped", "lm-eval/images")
    heard.clear()
    check_leaks(Shown({}), calibration, strict=True, emit=heard)
    assert not heard
