from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cptq.calibration.tokens import build_calibration
from cptq.config import CalibrationSettings, ModelSettings
from cptq.data.overlap import encode_sketch, sketch
from cptq.errors import EvaluationError
from cptq.evaluation.leaks import LeakGuard
from cptq.evaluation.options import EvalOptions
from cptq.evaluation.run import evaluate


def numbered(first: int, last: int) -> str:
    return " ".join(f"word number {i} of this text" for i in range(first, last))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(numbered(0, 300))
    return path


def guard(model, text: Path, heard, *, strict: bool) -> LeakGuard:
    settings = CalibrationSettings(calibration=str(text), samples=4, seqlen=256)
    record = build_calibration(model, settings, ModelSettings(model="m"), heard).record
    assert record.sketch
    return LeakGuard(record.sketch, record.origin, strict=strict, emit=heard)


def test_a_model_meets_its_calibration_text_again(load, heard, text: Path, tmp_path: Path) -> None:
    model = load("llama")
    options = EvalOptions(seqlen=64, limit=40)
    watched = replace(options, watch=guard(model, text, heard, strict=False))
    evaluate(model, f"text:{text}", watched, heard)
    assert any("the calibration text a.txt: the result flatters" in m for m in heard.notices)
    strict = replace(options, watch=guard(model, text, heard, strict=True))
    with pytest.raises(EvaluationError, match=r"is measured on passages .* text a\.txt"):
        evaluate(model, f"text:{text}", strict, heard)
    other = tmp_path / "b.txt"
    other.write_text(numbered(1000, 1300))
    heard.clear()
    evaluate(model, f"text:{other}", strict, heard)
    assert not any("calibration text" in message for message in heard.notices)


def test_the_windows_that_a_limit_leaves_out_do_not_count(load, heard, text: Path) -> None:
    model, seen = load("llama"), []
    options = EvalOptions(seqlen=64, watch=lambda name, rows: seen.append((name, *rows)))
    evaluate(model, f"text:{text}", replace(options, limit=2), heard)
    ((name, shown),) = seen
    ids = model.tokenizer(text.read_text())["input_ids"][:128]
    assert (name, shown) == (f"text:{text}", model.tokenizer.decode(ids))


def test_sentences_are_seen_whole_and_a_phrase_is_no_leak(heard) -> None:
    rows = [f"sentence number {i} says nothing new" for i in range(400)]
    watch = LeakGuard(encode_sketch(sketch(rows)), "sst2", strict=True, emit=heard)
    with pytest.raises(EvaluationError, match="leave out --strict"):
        watch("glue/sst2", rows[:40])
    watch("glue/sst2", [f"another sentence, {i}, of five words" for i in range(300)] + rows[:1])
    assert heard.notices == [
        "shares passages (1 of 400 fingerprints, 0.33% of a text) of the calibration text sst2: "
        "a turn of phrase, no overlap"
    ]
